"""Rotary embedding of the first heads of a joined projection, in plain PyTorch."""

import torch
from torch import Tensor


def rotary(x: Tensor, cos: Tensor, sin: Tensor, heads: int, inverse: bool) -> Tensor:
    """Return ``x`` ``[T, H, D]`` with its first ``heads`` heads rotated.

    The arguments are those of :func:`tli_engine.ops.rotary`, with ``cos`` and ``sin`` ``[T, D/2]``;
    ``inverse`` rotates by the negative angles. Products are in fp32, or fp64, and rounded once.
    """
    acc = torch.promote_types(x.dtype, torch.float32)
    a, b = x[:, :heads].to(acc).chunk(2, dim=-1)
    c, s = cos.to(acc)[:, None], sin.to(acc)[:, None]
    if inverse:
        s = -s
    rotated = torch.cat([a * c - b * s, b * c + a * s], dim=-1).to(x.dtype)
    return torch.cat([rotated, x[:, heads:]], dim=1).contiguous()
