"""Recording graphs: what must not happen meanwhile. Without a GPU, with a stand-in for ``torch.cuda.graph``."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tli_engine.models.graph_recorder import GraphRecorder, capture

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Failed(RuntimeError):
    """What ends a recording that something has spoilt."""


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Whether garbage was collected in each recording, and how it was asked for."""
    found: list[Any] = []

    @contextmanager
    def graph(*args: Any, **kwargs: Any) -> Iterator[None]:
        found.append((gc.isenabled(), args, kwargs))
        try:
            yield
        except RuntimeError:
            raise Failed("capture was invalidated") from None

    monkeypatch.setattr(torch.cuda, "graph", graph)
    return found


@pytest.mark.parametrize("collects", [True, False])
def test_no_garbage_is_collected(recorded: list[Any], collects: bool) -> None:
    graph: Any = object()
    try:
        if not collects:
            gc.disable()
        with capture(graph, "pool"):
            assert not gc.isenabled()
        assert gc.isenabled() == collects
        with pytest.raises(ValueError, match="not a number"), capture(graph):
            raise ValueError("not a number")
        assert gc.isenabled() == collects
    finally:
        gc.enable()
    options = {"capture_error_mode": "thread_local"}
    expected = [(False, (graph, "pool", None), options), (False, (graph, None, None), options)]
    assert recorded == expected


def test_the_cause_of_a_failure_is_shown(recorded: list[Any]) -> None:
    graph: Any = object()
    with pytest.raises(RuntimeError, match="is capturing") as caught, capture(graph):
        raise RuntimeError("operation not permitted when stream is capturing")
    assert not isinstance(caught.value, Failed)
    assert gc.isenabled()


class Ring:
    """Garbage that only the collector finds."""

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self.graph, self.own = graph, self


@GPU
@pytest.mark.gpu
def test_graphs_become_garbage_during_a_recording() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    recorder = GraphRecorder(device)
    x = torch.ones(8, device=device)
    recorder.launch(lambda: x + 1)
    Ring(recorder.record(lambda: x + 1)[0])
    threshold = gc.get_threshold()
    try:
        # any object made would start a collection
        gc.set_threshold(1, 1, 1)
        graph, y = recorder.record(lambda: [x + i for i in range(8)])
    finally:
        gc.set_threshold(*threshold)
    graph.replay()
    assert [int(t[0]) for t in y] == list(range(1, 9))


@GPU
@pytest.mark.gpu
def test_graphs_of_other_pools_overwrite_nothing() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    recorder = GraphRecorder(device)
    x = torch.arange(1 << 12, device=device)
    recorder.launch(lambda: (x + 1) * 2)
    graphs, results = zip(
        *(recorder.record(lambda i=i: (x + i) * 2 - 1, recorder.new_pool()) for i in range(3)),  # type: ignore[misc]
        strict=True,
    )
    for graph in (*graphs, *reversed(graphs)):
        graph.replay()
    for i, y in enumerate(results):
        assert torch.equal(y, (x + i) * 2 - 1)
