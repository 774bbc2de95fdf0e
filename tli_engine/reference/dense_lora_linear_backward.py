"""Gradients of ``dense_lora_linear``, in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tli_engine.reference.counter_dropout import counter_dropout


def dense_lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    sizes: Sequence[int],
    scaling: float,
    dropout: float,
    needs_dx: bool,
    needs_lora: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(dx, dA, dB)``; those not needed are empty, and ``weight`` is read for ``dx`` alone."""
    rank = lora_B.shape[1]
    dys, bs = (
        torch.split(dy, list(sizes), 1),
        torch.split((lora_B * scaling).to(dy.dtype), list(sizes)),
    )
    t = torch.cat([d @ b for d, b in zip(dys, bs, strict=True)], 1)
    dx, dA, dB = dy.new_empty(0), lora_A.new_empty(0), lora_B.new_empty(0)
    if needs_dx:
        update = t @ lora_A.to(dy.dtype)
        if seed is not None:
            update = counter_dropout(update, seed, dropout)
        dx = dy @ weight + update
    if needs_lora:
        dropped = x if seed is None else counter_dropout(x, seed, dropout)
        dA = (t.T @ dropped).to(lora_A.dtype)
        parts = [d.T @ part for d, part in zip(dys, torch.split(s, rank, 1), strict=True)]
        dB = torch.cat(parts).to(lora_B.dtype)
    return dx, dA, dB
