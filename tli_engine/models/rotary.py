"""Rotary embedding of the first heads of a joined projection, in plain PyTorch."""

import torch
from torch import Tensor


def rotary(x: Tensor, cos: Tensor, sin: Tensor, heads: int | None = None) -> Tensor:
    """Rotate the first heads of ``x`` by each token's angles; copy the others.

    Args:
        x: ``[T, H, D]``; dimension i is paired with i + D/2.
        cos: Cosines of each token's angles, ``[T, D/2]``.
        sin: Sines, as ``cos``.
        heads: How many heads are rotated, all if None.

    Returns:
        ``[T, H, D]``, contiguous, in ``x``'s dtype, rounded once.
    """
    heads = x.shape[1] if heads is None else heads
    acc = torch.promote_types(x.dtype, torch.float32)
    a, b = x[:, :heads].to(acc).chunk(2, dim=-1)
    c, s = cos.to(acc)[:, None], sin.to(acc)[:, None]
    rotated = torch.cat([a * c - b * s, b * c + a * s], dim=-1).to(x.dtype)
    return torch.cat([rotated, x[:, heads:]], dim=1) if heads < x.shape[1] else rotated
