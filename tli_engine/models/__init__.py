"""Loading the early blocks of a model, running packs through them, adapting them."""
