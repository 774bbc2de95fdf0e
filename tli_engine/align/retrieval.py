"""How well translations find each other: cosines, and ranks that an artefact cannot inflate."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tli_engine.align.pairing import Figures, Pairing


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
        true: Cosine of each pair, ``[N]``, fp64, on the host.
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
    return read(Pairing(source_groups, target_groups, source.device).measure(source, target))


def read(figures: Figures) -> Alignment:
    """Bring figures to the host, which waits for their device."""
    return read_all([figures])[0]


def read_all(figures: Sequence[Figures]) -> list[Alignment]:
    """Bring figures of the same pairs, of one layer each, to the host at once."""
    of_pairs = torch.stack([f.of_pairs for f in figures]).cpu()
    random = torch.stack([f.random for f in figures]).tolist()
    # a row for either way
    ranks, csls_ranks = of_pairs[:, 1::2], of_pairs[:, 2::2]
    reciprocal, hits = 1 / ranks, ranks == 1
    p_at_1, csls_p_at_1 = (t.double().mean(-1).tolist() for t in (hits, csls_ranks == 1))
    mrr = reciprocal.mean(-1).tolist()

    def direction(layer: int, way: int) -> Direction:
        return Direction(
            p_at_1=p_at_1[layer][way],
            mrr=mrr[layer][way],
            csls_p_at_1=csls_p_at_1[layer][way],
            reciprocal_ranks=reciprocal[layer, way],
            hits=hits[layer, way],
            candidates=figures[layer].candidates[way],
        )

    return [
        Alignment(of_pairs[k, 0], random[k], direction(k, 0), direction(k, 1))
        for k in range(len(figures))
    ]


def chance_mrr(candidates: int) -> float:
    """Mean reciprocal rank of a random order."""
    return sum(1 / rank for rank in range(1, candidates + 1)) / candidates


def distinct(vectors: Tensor, groups: Tensor) -> Tensor:
    """Vector of the first word of each group, ``[N, D]`` to ``[groups, D]``; groups are ``[N]``."""
    first = torch.full((int(groups.max()) + 1,), len(groups), device=groups.device)
    rows = torch.arange(len(groups), device=groups.device)
    return vectors[first.scatter_reduce(0, groups, rows, "amin")]
