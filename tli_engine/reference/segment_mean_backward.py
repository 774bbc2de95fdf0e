"""Gradient of the weighted mean of packed rows, in plain PyTorch."""

import torch
from torch import Tensor


def segment_mean_backward(
    dmean: Tensor, weight: Tensor, offsets: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return the gradient for the rows, ``[T, D]`` in ``dtype``; zeros beyond the last segment."""
    weight = weight.to(dmean.dtype)
    if len(dmean) == 0:
        return dmean.new_zeros(weight.shape[0], dmean.shape[1], dtype=dtype)
    rows = torch.arange(weight.shape[0], device=weight.device)
    weight = torch.where(rows < offsets[-1], weight, 0)
    # offsets are sorted: the segment of a row is the last offset not beyond it
    segment = (torch.searchsorted(offsets, rows, right=True) - 1).clamp(max=len(dmean) - 1)
    total = torch.zeros_like(dmean[:, 0]).index_add(0, segment, weight)
    share = weight / torch.where(total == 0, 1, total)[segment]
    return (dmean[segment] * share[:, None]).to(dtype)
