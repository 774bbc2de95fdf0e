"""Gradient of the pooled alignment loss for the rows of a pack, in plain PyTorch."""

import torch
from torch import Tensor

from tli_engine.reference.pooled_alignment_loss import chunks, negatives
from tli_engine.reference.segment_mean_backward import segment_mean_backward


def pooled_alignment_loss_backward(
    dloss: Tensor,
    pooled: Tensor,
    norm: Tensor,
    cos: Tensor,
    stats: Tensor,
    weight: Tensor,
    offsets: Tensor,
    groups: Tensor | None,
    loss: str,
    temperature: float,
    dtype: torch.dtype,
    most_cosines: int,
) -> Tensor:
    """Return the gradient for the rows, ``[T, H]`` in ``dtype``."""
    unit, dunit = pooled / norm[:, None], torch.zeros_like(pooled)
    N, ways = len(unit) // 2, len(stats) // 2
    everything = torch.arange(N, device=unit.device), cos
    for rows, part in [everything] if len(cos) else chunks(unit, stats[-1], most_cosines):
        negative = negatives(rows, N, groups)
        true = torch.zeros_like(part).scatter_(1, rows[:, None], 1)
        dcos = torch.zeros_like(part)
        for way in range(ways):
            top, worth = stats[2 * way : 2 * way + 2]
            if way == 0:
                top, worth = top[rows, None], worth[rows, None]
            if loss == "infonce":
                share = torch.where(negative | true.bool(), (part / temperature - top).exp(), 0)
                dcos += (share * worth - true) / temperature
            else:
                dcos += torch.where(negative & (part == top), worth, 0) - true * (worth > 0)
        dcos /= ways * N
        dunit[rows] = dcos @ unit[N:]
        dunit[N:] += dcos.T @ unit[rows]
    dpooled = (dunit - (dunit * unit).sum(1, keepdim=True) * unit) / norm[:, None]
    return segment_mean_backward(dpooled * dloss, weight, offsets, dtype)
