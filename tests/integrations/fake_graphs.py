"""A stand-in for CUDA graphs, which a CPU has not: tensors stay where they are, and are written anew."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class FakeGraph:
    """Runs a function again into the tensors that it returned first."""

    def __init__(self, run: Callable[[], Any], result: Any) -> None:
        self._run, self._result = run, result

    def replay(self) -> None:
        with torch.enable_grad():
            new = self._run()
        with torch.no_grad():
            for old, value in zip(_tensors(self._result), _tensors(new), strict=True):
                old.detach().copy_(value.detach())


class FakeRecorder:
    """As :class:`tli_engine.models.graph_recorder.GraphRecorder`; counts what it records."""

    recorded = 0

    def launch(self, run: Callable[[], Any]) -> Any:
        return run()

    def record(self, run: Callable[[], Any]) -> tuple[FakeGraph, Any]:
        self.recorded += 1
        result = run()
        # a graph writes where it wrote first: nothing is there before its first replay
        for tensor in _tensors(result):
            tensor.detach().fill_(float("nan"))
        return FakeGraph(run, result), result


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    dx, flat = result
    return [*([] if dx is None else [dx]), *flat]
