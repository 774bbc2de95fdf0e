"""Word pairs: reading, checking, tokenising, packing."""
