"""Launches recorded as CUDA graphs."""

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, NamedTuple, TypeVar

import torch
from torch.autograd.grad_mode import set_multithreading_enabled

T = TypeVar("T")


class _NoGarbage:
    """No collection while anyone is inside; threads may be there at once."""

    def __init__(self) -> None:
        self._lock, self._inside, self._collects = threading.Lock(), 0, False

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._collects = gc.isenabled()
                gc.disable()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._collects:
                gc.enable()


_no_garbage = _NoGarbage()


@contextmanager
def capture(
    graph: torch.cuda.CUDAGraph,
    pool: Any = None,
    stream: torch.cuda.Stream | None = None,
    begin: Callable[..., Any] | None = None,
) -> Iterator[None]:
    """As :class:`torch.cuda.graph`, for recordings among others and beside other threads.

    No garbage is collected meanwhile: a graph destroyed there would end the recording, which PyTorch 2.9
    and later do not see to themselves. What other threads do on the GPU is their own.

    Args:
        graph: Is to hold what is launched.
        pool: Memory shared with other graphs; by default its own.
        stream: That records.
        begin: In place of :class:`torch.cuda.graph`.

    Raises:
        RuntimeError: Something cannot be recorded; ``torch.OutOfMemoryError`` is one of these.

    Source: pytorch/pytorch#161037.
    """
    begin = torch.cuda.graph if begin is None else begin
    errors: list[RuntimeError] = []
    try:
        with _no_garbage, begin(graph, pool, stream, capture_error_mode="thread_local"):
            try:
                yield
            except RuntimeError as error:
                errors.append(error)
                raise
    except RuntimeError:
        # what ends a recording that failed raises too, and would hide the cause
        if errors:
            raise errors[0] from None
        raise


@contextmanager
def _at_once(
    graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream, capture_error_mode: str
) -> Iterator[None]:
    """As :class:`torch.cuda.graph`, which first waits for the device and gives back what is kept for later.

    What was given back is asked for again by the launches that follow, each time a wait for the device.
    """
    with torch.cuda.stream(stream):
        graph.capture_begin(pool, capture_error_mode)
        try:
            yield
        finally:
            graph.capture_end()


class _Pool(NamedTuple):
    """Memory that graphs share, by its number."""

    id: tuple[int, int]


class GraphRecorder:
    """Records what functions launch; its graphs must never run side by side.

    Kernels are compiled, and libraries take their workspaces, in a first call, which no graph may hold:
    :meth:`launch` what is to be recorded once before. What waits for the device cannot be recorded. Backward
    passes run in the calling thread: libraries have workspaces of each thread.

    Args:
        device: A GPU.
        at_once: Do not wait for the device, and give back memory that is kept for later only once a
            recording finds no other.
    """

    def __init__(self, device: torch.device, at_once: bool = False) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device, self._is_at_once = torch.device("cuda", index), at_once
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = self.new_pool()
        self._holder: torch.cuda.CUDAGraph | None = None

    def new_pool(self) -> _Pool:
        """Memory for graphs of which another's replay must not overwrite anything."""
        return _Pool(torch.cuda.graph_pool_handle())

    def launch(self, run: Callable[[], T], in_pool: bool = False) -> T:
        """Run in the stream that records, between what the current stream does before and after.

        Args:
            run: Launches.
            in_pool: Take memory where graphs have theirs, which nothing else can use while they are kept.
        """
        current = torch.cuda.current_stream(self._device)
        with self._of_graphs() if in_pool else nullcontext():
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream), set_multithreading_enabled(False):
                result = run()
            current.wait_stream(self._stream)
        return result

    @contextmanager
    def _of_graphs(self) -> Iterator[None]:
        """Let the calling thread take memory from the graphs' pool."""
        if self._holder is None:
            # a pool that no graph holds is gone
            torch.zeros(1, device=self._device)
            self._holder, _ = self.record(lambda: torch.zeros(1, device=self._device))
        # the allocator gives back nothing of what it keeps elsewhere in there (pytorch/pytorch#159674)
        torch.cuda.empty_cache()
        pool: Any = self._pool
        with torch.cuda.use_mem_pool(pool, self._device):
            yield

    def record(
        self, run: Callable[[], T], pool: _Pool | None = None
    ) -> tuple[torch.cuda.CUDAGraph, T]:
        """The graph, and what ``run`` returned: tensors that each replay writes. It is not run yet.

        A graph's replay may overwrite what those recorded after it in the same pool wrote: these lie where
        it had what it needed for a while only. What was recorded before it stays, as long as it is held.

        Args:
            run: Launches.
            pool: Of :meth:`new_pool`; by default that of all graphs which have none of their own.

        Raises:
            RuntimeError: Something cannot be recorded; ``torch.OutOfMemoryError`` is one of these.
        """
        pool = self._pool if pool is None else pool
        failed = torch.cuda.CUDAGraph()
        if self._is_at_once:
            with suppress(torch.OutOfMemoryError):
                return self._record(failed, run, pool, _at_once)
        # it is held until the other is there: a pool that has lost its graphs takes no new ones
        return self._record(torch.cuda.CUDAGraph(), run, pool)

    def _record(
        self,
        graph: torch.cuda.CUDAGraph,
        run: Callable[[], T],
        pool: _Pool,
        begin: Callable[..., Any] | None = None,
    ) -> tuple[torch.cuda.CUDAGraph, T]:
        with capture(graph, pool.id, self._stream, begin), set_multithreading_enabled(False):
            result = run()
        return graph, result

    def memory(self, pool: _Pool) -> int:
        """Bytes that graphs of a pool hold, those of tensors that they write and that live included."""
        segments = torch.cuda.memory_snapshot(pool.id)  # type: ignore[no-untyped-call]
        return sum(segment["total_size"] for segment in segments)

    def give_back(self) -> None:
        """Let others have the memory of graphs that are no more."""
        torch.cuda.empty_cache()
