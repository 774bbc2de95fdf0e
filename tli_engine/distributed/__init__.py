"""Several processes, a GPU each, that train one model together, on ``torch.distributed``."""
