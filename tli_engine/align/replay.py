"""The comparison of one layer's vectors after another, beside the layers and without Python between launches."""

from dataclasses import replace

import torch
from torch import Tensor

from tli_engine.align.pairing import Figures, Pairing
from tli_engine.models.graph_recorder import capture

# pairs up to which the launches cost more than what they compute
_FEW_PAIRS = 8192


class Measure:
    """:meth:`Pairing.measure` of the vectors of one layer after another, by each pooling.

    On a GPU it is a graph, from the second layer on, in a stream of its own: a comparison is some
    hundred small launches, which take a host longer than a GPU computes and leave the GPU to the
    next layer's products meanwhile.
    """

    def __init__(self, pairing: Pairing, pairs: int) -> None:
        """Take the comparison, and the number of pairs: many are not worth a graph."""
        self._pairing, self._few = pairing, pairs <= _FEW_PAIRS
        self._measured: list[list[Figures]] = []
        self._replay: _Replay | None = None

    def add(self, vectors: Tensor) -> None:
        """Compare ``[poolings, V, D]``, which hold the vectors of both sides; always the same shape."""
        if self._replay is not None:
            self._measured.append(self._replay(vectors))
            return
        if self._measured and vectors.is_cuda and self._few:
            # libraries set themselves up in a first comparison, which no graph may hold
            self._replay = _Replay(self._pairing, vectors)
            self._measured.append(self._replay(vectors))
            return
        self._measured.append(_compare(self._pairing, vectors))

    def figures(self) -> list[list[Figures]]:
        """Figures of each layer, for each pooling, in the current stream's order."""
        if self._replay is not None:
            self._replay.join()
        return [list(of_pooling) for of_pooling in zip(*self._measured, strict=True)]


class _Replay:
    """A graph of the comparison, and the vectors that it reads."""

    def __init__(self, pairing: Pairing, vectors: Tensor) -> None:
        self._vectors = vectors.clone()
        self._stream = torch.cuda.Stream(vectors.device)  # type: ignore[no-untyped-call]
        self._graph = torch.cuda.CUDAGraph()
        with capture(self._graph):
            self._figures = _compare(pairing, self._vectors)

    def __call__(self, vectors: Tensor) -> list[Figures]:
        # the comparison before has read its vectors
        self.join()
        self._vectors.copy_(vectors)
        self._stream.wait_stream(torch.cuda.current_stream(vectors.device))
        with torch.cuda.stream(self._stream):
            self._graph.replay()
            return [
                replace(f, of_pairs=f.of_pairs.clone(), random=f.random.clone())
                for f in self._figures
            ]

    def join(self) -> None:
        """Let what the current stream does next wait for the comparison."""
        torch.cuda.current_stream(self._vectors.device).wait_stream(self._stream)


def _compare(pairing: Pairing, vectors: Tensor) -> list[Figures]:
    return [pairing.measure(v, v) for v in vectors]
