"""Weighted mean of packed rows per segment, in plain PyTorch."""

import torch
from torch import Tensor


def segment_mean(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Return the means; see :func:`tli_engine.ops.segment_mean`."""
    acc = torch.promote_types(x.dtype, torch.float32)
    weight = weight.to(acc)
    total = torch.segment_reduce(weight, "sum", offsets=offsets, unsafe=True, initial=0)
    # not the product alone: a row left out may be infinite, as fp16 activations can be
    weighted = torch.where(weight[:, None] != 0, x.to(acc) * weight[:, None], 0)
    summed = torch.segment_reduce(weighted, "sum", offsets=offsets, unsafe=True, initial=0)
    return summed / torch.where(total == 0, 1, total)[:, None]
