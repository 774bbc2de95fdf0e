"""How well translations find each other: cosines, and ranks that an artefact cannot inflate."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tli_engine.ops import cosine_similarity

# neighbours in CSLS's local scaling
_NEIGHBOURS = 10
# cosines this close are a tie: more than fp64 rounding, less than any fp32 vector can tell apart
_TIE = 1e-12
_ROWS = 1024


@dataclass(frozen=True)
class Direction:
    """Retrieval of one language's words by the other's.

    Attributes:
        p_at_1: Share of words whose translation comes first.
        mrr: Mean reciprocal rank of the translation.
        csls_p_at_1: ``p_at_1`` by cross-domain similarity local scaling (Conneau et al. 2018).
        reciprocal_ranks: One a pair, ``[N]``, fp64.
        hits: Whether the translation comes first, ``[N]``, bool.
        candidates: Number of distinct words to choose from.
    """

    p_at_1: float
    mrr: float
    csls_p_at_1: float
    reciprocal_ranks: Tensor
    hits: Tensor
    candidates: int

    def to_json(self) -> dict[str, float]:
        """The three figures."""
        return {"p_at_1": self.p_at_1, "mrr": self.mrr, "csls_p_at_1": self.csls_p_at_1}


@dataclass(frozen=True)
class Alignment:
    """Cosines and retrieval of a list of pairs.

    Attributes:
        true: Cosine of each pair, ``[N]``, fp64.
        cosine_random: Mean cosine over all mismatched pairs, those that repeat a word left out.
        forward: Targets retrieved by sources.
        reverse: Sources retrieved by targets.
    """

    true: Tensor
    cosine_random: float
    forward: Direction
    reverse: Direction

    @property
    def cosine_true(self) -> float:
        """Mean cosine of the pairs."""
        return float(self.true.mean())

    @property
    def separation(self) -> float:
        """Mean cosine of the pairs less that of mismatched pairs."""
        return self.cosine_true - self.cosine_random

    @property
    def two_way_reciprocal_ranks(self) -> Tensor:
        """Mean over both directions of each pair's reciprocal rank, ``[N]``."""
        return 0.5 * (self.forward.reciprocal_ranks + self.reverse.reciprocal_ranks)

    def to_json(self) -> dict[str, Any]:
        """The contract's keys."""
        return {
            "cosine_true": self.cosine_true,
            "cosine_random": self.cosine_random,
            "separation": self.separation,
            **self.forward.to_json(),
            "reverse": self.reverse.to_json(),
        }


def measure_alignment(
    source: Tensor, target: Tensor, source_groups: list[int], target_groups: list[int]
) -> Alignment:
    """Compare the vectors of a list of pairs, in fp64.

    Args:
        source: Vectors of the first words, ``[N, D]``.
        target: Vectors of the second words, ``[N, D]``.
        source_groups: Number of the distinct word that each source is, from 0.
        target_groups: The same for the targets.

    Returns:
        Figures over all pairs. A candidate that ties with the translation counts as better than
        it, so that a collapsed space scores P@1 = 0. Another translation of the same word is
        left out of the ranking.
    """
    x, y = source.double(), target.double()
    x_groups = torch.tensor(source_groups, device=x.device)
    y_groups = torch.tensor(target_groups, device=x.device)
    x_words, y_words = distinct(x, x_groups), distinct(y, y_groups)
    x_hub, y_hub = _neighbourhood(x_words, y_words), _neighbourhood(y_words, x_words)
    rows = [slice(start, start + _ROWS) for start in range(0, len(x), _ROWS)]
    true = torch.cat([cosine_similarity(x[r], y[r]).diagonal() for r in rows])
    return Alignment(
        true=true,
        cosine_random=_mean_of_mismatched(x, y, x_groups, y_groups),
        forward=_direction(x_words, y_words, x_groups, y_groups, y_hub),
        reverse=_direction(y_words, x_words, y_groups, x_groups, x_hub),
    )


def chance_mrr(candidates: int) -> float:
    """Mean reciprocal rank of a random order."""
    return sum(1 / rank for rank in range(1, candidates + 1)) / candidates


def distinct(vectors: Tensor, groups: Tensor) -> Tensor:
    """Vector of the first word of each group, ``[N, D]`` to ``[groups, D]``; groups are ``[N]``."""
    first = torch.full((int(groups.max()) + 1,), len(groups), device=groups.device)
    rows = torch.arange(len(groups), device=groups.device)
    return vectors[first.scatter_reduce(0, groups, rows, "amin")]


def _cosine_rows(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(x), _ROWS):
        rows = slice(start, min(start + _ROWS, len(x)))
        yield rows, cosine_similarity(x[rows], y)


def _neighbourhood(x: Tensor, y: Tensor) -> Tensor:
    """Mean cosine of each row of x with its nearest rows of y: CSLS's hubness, ``[N]``."""
    k = min(_NEIGHBOURS, len(y))
    return torch.cat([cosine.topk(k).values.mean(1) for _, cosine in _cosine_rows(x, y)])


def _mean_of_mismatched(x: Tensor, y: Tensor, x_groups: Tensor, y_groups: Tensor) -> float:
    """Mean cosine over pairs (i, j) that share neither word; exact, in ``O(N)`` memory a row."""
    total, count = 0.0, 0
    for rows, cosine in _cosine_rows(x, y):
        keep = (x_groups[rows, None] != x_groups) & (y_groups[rows, None] != y_groups)
        total += float(cosine[keep].sum())
        count += int(keep.sum())
    return total / count if count else float("nan")


def _direction(
    queries: Tensor, words: Tensor, query_groups: Tensor, word_groups: Tensor, hub: Tensor
) -> Direction:
    """Rank ``words`` for each pair's query; all are distinct words, groups give each pair's own."""
    pairs = torch.arange(len(query_groups), device=queries.device)
    order = query_groups.argsort(stable=True)
    ranks, csls_ranks = torch.empty_like(pairs), torch.empty_like(pairs)
    for start in range(0, len(order), _ROWS):
        chunk = order[start : start + _ROWS]
        cosine = cosine_similarity(queries[query_groups[chunk]], words)
        own = word_groups[chunk, None]
        # every translation of this query is out of the race, the pair's own one included
        out = torch.zeros_like(cosine, dtype=torch.bool).scatter_(1, own, True)
        for other in _other_translations(chunk, query_groups, word_groups):
            out[other[:, 0], other[:, 1]] = True
        ranks[chunk] = _rank(cosine, own, out)
        csls_ranks[chunk] = _rank(2 * cosine - hub, own, out)
    reciprocal = 1 / ranks.double()
    return Direction(
        p_at_1=float((ranks == 1).double().mean()),
        mrr=float(reciprocal.mean()),
        csls_p_at_1=float((csls_ranks == 1).double().mean()),
        reciprocal_ranks=reciprocal.cpu(),
        hits=(ranks == 1).cpu(),
        candidates=len(words),
    )


def _other_translations(
    chunk: Tensor, query_groups: Tensor, word_groups: Tensor
) -> Iterator[Tensor]:
    """(row of the chunk, word) for every pair whose query is that row's, ``[P, 2]``."""
    repeated = query_groups.bincount() > 1
    for row in repeated[query_groups[chunk]].nonzero()[:, 0]:
        translations = word_groups[query_groups == query_groups[chunk[row]]]
        yield torch.stack([row.expand_as(translations), translations], dim=1)


def _rank(score: Tensor, own: Tensor, out: Tensor) -> Tensor:
    true = score.gather(1, own)
    # not ">=": what is NaN must come before the translation, or a broken model would score 1
    return 1 + (~(score < true - _TIE) & ~out).sum(1)
