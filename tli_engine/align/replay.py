"""The comparison of one layer's vectors after another, without Python between its launches."""

from dataclasses import replace

import torch
from torch import Tensor

from tli_engine.align.pairing import Figures, Pairing

# pairs up to which the launches cost more than what they compute
_FEW_PAIRS = 8192


class Measure:
    """:meth:`Pairing.measure` of vectors of one shape; on a GPU a graph, from the second time on.

    A comparison is some hundred small launches, which take a host longer than a GPU computes.
    """

    def __init__(self, pairing: Pairing, pairs: int) -> None:
        """Take the comparison, and the number of pairs: many are not worth a graph."""
        self._pairing, self._few = pairing, pairs <= _FEW_PAIRS
        self._graph: torch.cuda.CUDAGraph | None = None
        self._vectors: Tensor | None = None
        self._figures: Figures | None = None

    def __call__(self, vectors: Tensor) -> Figures:
        """Compare ``[V, D]``, which hold the vectors of both sides; the same shape at each call."""
        if not (vectors.is_cuda and self._few):
            return self._pairing.measure(vectors, vectors)
        if self._vectors is None:
            # libraries set themselves up in a first call, which no graph may hold
            self._vectors = vectors.clone()
            return self._pairing.measure(vectors, vectors)
        self._vectors.copy_(vectors)
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._figures = self._pairing.measure(self._vectors, self._vectors)
        self._graph.replay()
        assert self._figures is not None
        of_pairs, random = self._figures.of_pairs.clone(), self._figures.random.clone()
        return replace(self._figures, of_pairs=of_pairs, random=random)
