"""Gradient of the pooled alignment loss for the rows: one launch, the incoming scalar included."""

import torch
from torch import Tensor

from tli_engine.kernels.segment_mean_backward import spread


def pooled_alignment_loss_backward(
    dloss: Tensor, dpooled: Tensor, weight: Tensor, offsets: Tensor, dtype: torch.dtype
) -> Tensor:
    """Launch; the arguments are those of ``tli_engine::pooled_alignment_loss_backward``."""
    return spread(dpooled, weight, offsets, dtype, dloss)
