"""Gradient of the weighted mean of packed rows, in plain PyTorch."""

import torch
from torch import Tensor


def segment_mean_backward(
    dmean: Tensor, weight: Tensor, offsets: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return the gradient for the rows, ``[T, D]`` in ``dtype``."""
    weight = weight.to(dmean.dtype)
    rows = torch.arange(weight.shape[0], device=weight.device)
    # offsets are sorted: the segment of a row is the last offset not beyond it; rows past the last
    # segment weigh nothing
    segment = (torch.searchsorted(offsets, rows, right=True) - 1).clamp(max=len(dmean) - 1)
    total = torch.zeros_like(dmean[:, 0]).index_add(0, segment, weight)
    share = weight / torch.where(total == 0, 1, total)[segment]
    return (dmean[segment] * share[:, None]).to(dtype)
