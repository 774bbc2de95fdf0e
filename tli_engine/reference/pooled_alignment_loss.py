"""Loss of pooled words' cosines and its gradient for the pooled vectors, in plain PyTorch."""

import torch
from torch import Tensor

from tli_engine.reference.segment_mean import segment_mean

# rows of the cosine matrix held at once
_ROWS = 1024


def pooled_alignment_loss(
    hidden: Tensor,
    weight: Tensor,
    offsets: Tensor,
    groups: Tensor | None,
    loss: str,
    margin: float,
    temperature: float,
    two_way: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``(loss, cosine_true, cosine_random, dpooled)``; see the op of this name."""
    pooled = segment_mean(hidden, weight, offsets)
    norm = pooled.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    unit, dunit = pooled / norm, torch.zeros_like(pooled)
    sides, dsides = unit.chunk(2), dunit.chunk(2)
    ways = 2 if two_way else 1
    N = len(sides[0])
    value, true, wrong, count = unit.new_zeros(4).unbind()
    for way in range(ways):
        own, other = sides[way], sides[1 - way]
        for first in range(0, N, _ROWS):
            rows = torch.arange(first, min(first + _ROWS, N), device=unit.device)
            cos = own[rows] @ other.T
            negative = _negatives(rows, N, groups)
            if loss == "infonce":
                losses, dcos = _infonce(cos, rows, negative, temperature)
            else:
                semihard = loss == "triplet-semihard"
                losses, dcos = _triplet(cos, rows, negative, margin, semihard)
            value = value + losses.sum() / (ways * N)
            dcos = dcos / (ways * N)
            dsides[way][rows] += dcos @ other
            dsides[1 - way].add_(dcos.T @ own[rows])
            if way == 0:
                true = true + cos.gather(1, rows[:, None]).sum() / N
                wrong = wrong + torch.where(negative, cos, 0).sum()
                count = count + negative.sum()
    dpooled = (dunit - (dunit * unit).sum(1, keepdim=True) * unit) / norm
    return value, true, wrong / count, dpooled


def _negatives(rows: Tensor, N: int, groups: Tensor | None) -> Tensor:
    """Whether word j of the other language is a wrong translation of each row's, ``[R, N]``."""
    negative = rows[:, None] != torch.arange(N, device=rows.device)
    if groups is not None:
        negative &= (groups[:, rows, None] != groups[:, None, :]).all(0)
    return negative


def _infonce(
    cos: Tensor, rows: Tensor, negative: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    true = torch.zeros_like(cos).scatter_(1, rows[:, None], 1)
    logits = (cos / temperature).masked_fill(~(negative | true.bool()), -torch.inf)
    losses = -logits.log_softmax(1).gather(1, rows[:, None])[:, 0]
    return losses, (logits.softmax(1) - true) / temperature


def _triplet(
    cos: Tensor, rows: Tensor, negative: Tensor, margin: float, semihard: bool
) -> tuple[Tensor, Tensor]:
    positive = cos.gather(1, rows[:, None])
    candidate = negative
    if semihard:
        gap = positive - cos
        candidate = negative & (gap > 0) & (gap < margin)
    hardest = cos.masked_fill(~candidate, -torch.inf).amax(1, keepdim=True)
    value = margin + hardest - positive
    # equally hard negatives share the gradient
    tied = candidate & (cos == hardest)
    share = tied / tied.sum(1, keepdim=True).clamp(min=1)
    share = share.to(cos.dtype).scatter_add(1, rows[:, None], -torch.ones_like(positive))
    return torch.relu(value)[:, 0], torch.where(value > 0, share, 0)
