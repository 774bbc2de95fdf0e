"""Recording graphs: what must not happen meanwhile. Without a GPU, with a stand-in for ``torch.cuda.graph``."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import pytest
import torch

from tli_engine.models.graph_recorder import GraphRecorder, _Pool, capture

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


def test_recordings_of_two_threads_end_one_after_the_other(recorded: list[Any]) -> None:
    graph: Any = object()
    first, second = capture(graph), capture(graph)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    # the other still records
    assert not gc.isenabled()
    second.__exit__(None, None, None)
    assert gc.isenabled()


def test_the_cause_of_a_failure_is_shown(recorded: list[Any]) -> None:
    graph: Any = object()
    with pytest.raises(RuntimeError, match="is capturing") as caught, capture(graph):
        raise RuntimeError("operation not permitted when stream is capturing")
    assert not isinstance(caught.value, Failed)
    assert gc.isenabled()


class FakeGraph:
    """Notes what it is asked for."""

    asked: ClassVar[list[Any]] = []

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        self.asked.append(("begin", pool, capture_error_mode, gc.isenabled()))

    def capture_end(self) -> None:
        self.asked.append("end")


@pytest.fixture
def recorder(recorded: list[Any], monkeypatch: pytest.MonkeyPatch) -> GraphRecorder:
    """One that records at once, without a GPU."""
    FakeGraph.asked = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "its stream")
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    return GraphRecorder(torch.device("cuda", 0), at_once=True)


def test_a_recording_at_once_neither_waits_nor_empties(
    recorder: GraphRecorder, recorded: list[Any]
) -> None:
    graph, result = recorder.record(lambda: 5, _Pool((0, 2)))
    assert isinstance(graph, FakeGraph)
    assert result == 5
    assert FakeGraph.asked == [("begin", (0, 2), "thread_local", False), "end"]
    # torch.cuda.graph had no part in it
    assert not recorded
    with pytest.raises(RuntimeError, match="is capturing"):
        recorder.record(lambda: _fail(RuntimeError("not permitted when stream is capturing")))
    assert FakeGraph.asked[2:] == [("begin", (0, 1), "thread_local", False), "end"]
    assert not recorded
    assert gc.isenabled()


def test_what_is_kept_for_later_is_given_back_once_there_is_no_other(
    recorder: GraphRecorder, recorded: list[Any]
) -> None:
    errors = [torch.OutOfMemoryError("no memory")]
    _, result = recorder.record(lambda: _fail(errors.pop()) if errors else 5, _Pool((0, 2)))
    assert result == 5
    assert FakeGraph.asked == [("begin", (0, 2), "thread_local", False), "end"]
    # the second time by torch.cuda.graph, which empties the cache
    ((_, (graph, *where), _),) = recorded
    assert isinstance(graph, FakeGraph)
    assert where == [(0, 2), "its stream"]
    with pytest.raises(torch.OutOfMemoryError):
        recorder.record(lambda: _fail(torch.OutOfMemoryError("no memory")))


def _fail(error: Exception) -> Any:
    raise error


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


@GPU
@pytest.mark.gpu
def test_recordings_at_once_are_those_of_waiting_ones() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.arange(1 << 20, device=device)
    expected = (x + 3) * 2
    for at_once in (False, True):
        recorder = GraphRecorder(device, at_once)
        recorder.launch(lambda: (x + 3) * 2)
        kept = torch.cuda.memory_reserved()
        pool = recorder.new_pool()
        graph, y = recorder.record(lambda: (x + 3) * 2, pool)
        # two tensors of 8 MiB
        assert 1 << 24 <= recorder.memory(pool) < 1 << 26
        if at_once:
            # and small tensors of the capture, in a segment of 2 MiB
            more = torch.cuda.memory_reserved() - kept - recorder.memory(pool)
            assert 0 <= more <= 1 << 21
        graph.replay()
        assert torch.equal(y, expected)
        del graph, y
        recorder.give_back()
        assert recorder.memory(pool) == 0


@GPU
@pytest.mark.gpu
def test_memory_that_is_kept_for_later_is_taken_by_a_recording() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    recorder = GraphRecorder(device, at_once=True)
    half = torch.cuda.mem_get_info()[0] // 8 * 5
    torch.empty(half, dtype=torch.uint8, device=device)
    # it is kept, and a graph's pool cannot take it from there
    assert torch.cuda.mem_get_info()[0] < half
    x = torch.zeros(1, dtype=torch.uint8, device=device)
    graph, y = recorder.record(lambda: (x + 7).repeat(half))
    graph.replay()
    assert int(y[-1]) == 7
