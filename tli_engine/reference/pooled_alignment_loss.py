"""Loss of pooled words' cosines, and what its gradient needs, in plain PyTorch."""

from collections.abc import Iterator

import torch
from torch import Tensor

from tli_engine.reference.segment_mean import segment_mean


def pooled_alignment_loss(
    hidden: Tensor,
    weight: Tensor,
    offsets: Tensor,
    groups: Tensor | None,
    loss: str,
    margin: float,
    temperature: float,
    two_way: bool,
    most_cosines: int,
) -> tuple[Tensor, ...]:
    """Return loss, both mean cosines, and pooled vectors, norms, cosines and ``stats``.

    ``stats`` has two rows for each way, then the true cosines: the loss's gradient for cosine c is
    worth w where c is the hardest, t, or of InfoNCE ``exp(c / temperature - t) * w``, less 1 in all
    where c is true. Cosines are kept if there are no more than ``most_cosines``, ``[N, N]`` or ``[0, N]``.
    """
    pooled = segment_mean(hidden, weight, offsets)
    norm = pooled.norm(dim=-1).clamp(min=1e-12)
    unit = pooled / norm[:, None]
    N, ways = len(unit) // 2, 2 if two_way else 1
    stats = unit.new_zeros(2 * ways + 1, N)
    stats[-1] = positive = (unit[:N] * unit[N:]).sum(1)
    tops, worths = stats[:-1:2].fill_(-torch.inf), stats[1:-1:2]
    kept, (wrong, count) = unit.new_empty(0, N), unit.new_zeros(2).unbind()
    for rows, cos in chunks(unit, positive, most_cosines):
        negative = negatives(rows, N, groups)
        wrong, count = wrong + torch.where(negative, cos, 0).sum(), count + negative.sum()
        kept = cos if len(cos) == N else kept
        for way in range(ways):
            part = rows if way == 0 else slice(None)
            own = positive[rows, None] if way == 0 else positive
            value = _values(cos, rows, negative, own, loss, margin, temperature)
            merged = _merged(tops[way, part], worths[way, part], value, 1 - way, loss)
            tops[way, part], worths[way, part] = merged
    if loss == "infonce":
        losses = tops - positive / temperature
        worths.fill_(1)
    else:
        losses = torch.relu(margin + tops - positive)
        # equally hard negatives share the gradient
        worths.reciprocal_().masked_fill_(~(losses > 0), 0)
    return losses.mean(), positive.mean(), wrong / count, pooled, norm, kept, stats


def chunks(unit: Tensor, positive: Tensor, most_cosines: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield numbers of sources, and their cosines with all targets, ``[R, N]``."""
    N = len(positive)
    step = max(1, min(N, most_cosines // N))
    for rows in torch.split(torch.arange(N, device=unit.device), step):
        cos = unit[rows] @ unit[N:].T
        yield rows, cos.scatter_(1, rows[:, None], positive[rows, None])


def negatives(rows: Tensor, N: int, groups: Tensor | None) -> Tensor:
    """Whether word j of the other language is a wrong translation of each row's, ``[R, N]``."""
    negative = rows[:, None] != torch.arange(N, device=rows.device)
    if groups is not None:
        negative &= (groups[:, rows, None] != groups[:, None, :]).all(0)
    return negative


def _values(
    cos: Tensor,
    rows: Tensor,
    negative: Tensor,
    positive: Tensor,
    loss: str,
    margin: float,
    temperature: float,
) -> Tensor:
    """Logits, or cosines of the negatives to choose among; -inf for others."""
    if loss == "infonce":
        chosen = negative.scatter(1, rows[:, None], True)
        return (cos / temperature).masked_fill(~chosen, -torch.inf)
    if loss == "triplet-semihard":
        gap = positive - cos
        negative = negative & (gap > 0) & (gap < margin)
    return cos.masked_fill(~negative, -torch.inf)


def _merged(top: Tensor, ties: Tensor, value: Tensor, dim: int, loss: str) -> tuple[Tensor, Tensor]:
    """Log of the sum of powers, or the largest value and its ties, with those of chunks before."""
    if loss == "infonce":
        return torch.logaddexp(top, value.logsumexp(dim)), ties
    highest = torch.maximum(top, value.amax(dim))
    more = (value == highest.unsqueeze(dim)).sum(dim)
    return highest, torch.where(top == highest, ties, 0) + more
