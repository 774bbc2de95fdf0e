"""Gradient of the pooled alignment loss for the rows of a pack, in plain PyTorch."""

import torch
from torch import Tensor

from tli_engine.reference.segment_mean_backward import segment_mean_backward


def pooled_alignment_loss_backward(
    dloss: Tensor, dpooled: Tensor, weight: Tensor, offsets: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return the gradient for the rows, ``[T, H]`` in ``dtype``."""
    return segment_mean_backward(dpooled * dloss, weight, offsets, dtype)
