"""Cosine similarity of all pairs of rows, in plain PyTorch."""

import torch
from torch import Tensor


def cosine_similarity(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(cos, x_norm, y_norm)``; see :func:`tli_engine.ops.cosine_similarity`."""
    acc = torch.promote_types(x.dtype, torch.float32)
    x, y = x.to(acc), y.to(acc)
    x_norm = x.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    y_norm = y.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return (x / x_norm) @ (y / y_norm).T, x_norm, y_norm
