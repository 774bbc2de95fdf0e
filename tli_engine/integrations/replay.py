"""Blocks on hidden states of one shape, replayed from CUDA graphs: a word's work is mostly the host's."""

import warnings
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from tli_engine.models.graph_recorder import capture

# calls of a shape before it is captured: libraries set themselves up in the first, and few are not worth it
_CALLS_BEFORE = 3

Run = Callable[[Tensor], Tensor]


class Captured:
    """A computation on a tensor as a CUDA graph; what it returns is overwritten by the next call."""

    def __init__(self, run: Run, x: Tensor, pool: object) -> None:
        self._x = x.clone()
        self._graph = torch.cuda.CUDAGraph()
        with capture(self._graph, pool):
            self._y = run(self._x)

    def __call__(self, x: Tensor) -> Tensor:
        """Run it on ``x``, of the same shape and dtype."""
        self._x.copy_(x)
        self._graph.replay()
        return self._y


class Replays:
    """Computations without gradients, each by its key; on a GPU a graph from the fourth call on.

    Args:
        capture: Makes a graph of a computation; ``None`` makes none.
    """

    def __init__(self, capture: Callable[[Run, Tensor], Run] | None) -> None:
        self._capture = capture
        self._calls: dict[Hashable, int] = {}
        self._graphs: dict[Hashable, Run] = {}

    @classmethod
    def on(cls, device: torch.device) -> "Replays":
        """Those of a device; only GPUs have graphs."""
        if device.type != "cuda":
            return cls(None)
        pool = torch.cuda.graph_pool_handle()
        return cls(lambda run, x: Captured(run, x, pool))

    def clear(self) -> None:
        """Forget all: what they read has moved."""
        self._calls.clear()
        self._graphs.clear()

    def __call__(self, key: Hashable, run: Run, x: Tensor) -> Tensor:
        """Return ``run(x)``; ``key`` says everything that this depends on beside ``x``'s values."""
        if self._capture is None:
            return run(x)
        graph = self._graphs.get(key)
        if graph is None:
            self._calls[key] = self._calls.get(key, 0) + 1
            if self._calls[key] <= _CALLS_BEFORE:
                return run(x)
            try:
                graph = self._graphs[key] = self._capture(run, x)
            except RuntimeError as reason:
                warnings.warn(f"no CUDA graphs of blocks: {reason}", stacklevel=2)
                self._capture = None
                return run(x)
        return graph(x).clone()
