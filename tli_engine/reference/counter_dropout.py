"""Dropout whose mask is a function of (seed, row, column), in plain PyTorch."""

import torch
from torch import Tensor

from tli_engine.reference.philox import philox


def counter_dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """Return ``x``, ``[M, K]``, a share ``p`` of it zeroed and the rest scaled by ``1 / (1 - p)``.

    Args:
        x: Rows.
        seed: One int64; the same seed gives the same mask.
        p: Share, in [0, 1).
    """
    rows = torch.arange(x.shape[0], device=x.device)[:, None].expand(x.shape)
    columns = torch.arange(x.shape[1], device=x.device)[None, :].expand(x.shape)
    kept = (philox(seed.view(()), columns, rows)[0] >> 1) >= int(p * 2**31)
    return torch.where(kept, x * (1 / (1 - p)), 0)
