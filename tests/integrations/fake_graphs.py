"""A stand-in for CUDA graphs, which a CPU has not: tensors stay where they are, and are written anew."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tli_engine import accelerate
from tli_engine.integrations.lazy_model import settings_of
from tli_engine.integrations.training_graphs import LAUNCHED, TrainingGraphs


class FakeGraph:
    """Runs a function again into the tensors that it returned first.

    Args:
        run: The function.
        result: Of its first run.
        pool: Graphs that share its memory, in the order of their recording.
    """

    def __init__(self, run: Callable[[], Any], result: Any, pool: list["FakeGraph"]) -> None:
        self._run, self._result, self._pool = run, result, pool
        self._is_overwritten = False
        # a way back reads what the way there left, which was recorded before it
        self._needed = pool[-1] if pool and isinstance(result, tuple) else self
        pool.append(self)

    def replay(self) -> None:
        # what was recorded later lies where this had what it needed for a while
        for later in self._pool[self._pool.index(self) + 1 :]:
            later._is_overwritten = True
        self._is_overwritten = False
        with torch.enable_grad():
            new = self._run()
        with torch.no_grad():
            for old, value in zip(_tensors(self._result), _tensors(new), strict=True):
                lost = float("nan") if self._needed._is_overwritten else 0
                old.detach().copy_(value.detach() + lost)


class FakeRecorder:
    """As :class:`tli_engine.models.graph_recorder.GraphRecorder`; counts what it records."""

    recorded = launched = given_back = 0

    def launch(self, run: Callable[[], Any]) -> Any:
        self.launched += 1
        return run()

    def new_pool(self) -> list[FakeGraph]:
        return []

    def memory(self, pool: list[FakeGraph]) -> int:
        return 100 * len(pool)

    def give_back(self) -> None:
        self.given_back += 1

    def record(self, run: Callable[[], Any], pool: list[FakeGraph]) -> tuple[FakeGraph, Any]:
        self.recorded += 1
        result = run()
        # a graph writes where it wrote first: nothing is there before its first replay
        for tensor in _tensors(result):
            tensor.detach().fill_(float("nan"))
        return FakeGraph(run, result, pool), result


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    dx, flat = result
    return [*([] if dx is None else [dx]), *flat]


def recorded(model: Any, **options: Any) -> FakeRecorder:
    """Accelerate a model, with recordings of training steps as scripts have them."""
    accelerate(model)
    recorder = FakeRecorder()
    for module in model.modules():
        settings = settings_of(module)
        if settings is not None:
            settings.graphs = TrainingGraphs(lambda device: recorder, **options)
            settings.counts.clear()
    return recorder


def counts(model: Any) -> dict[str, int]:
    found = settings_of(model.get_base_model() if hasattr(model, "peft_config") else model)
    assert found is not None
    return found.counts


def reasons(model: Any) -> list[str]:
    return [n.removeprefix(LAUNCHED) for n in counts(model) if n.startswith(LAUNCHED)]


def read(model: Any, tokens: dict[str, Tensor], k: int = 2) -> Tensor:
    state: Tensor = model(**tokens, output_hidden_states=True).hidden_states[k]
    return state
