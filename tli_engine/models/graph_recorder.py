"""Launches recorded as CUDA graphs."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch.autograd.grad_mode import set_multithreading_enabled

T = TypeVar("T")


@contextmanager
def capture(
    graph: torch.cuda.CUDAGraph, pool: Any = None, stream: torch.cuda.Stream | None = None
) -> Iterator[None]:
    """As :class:`torch.cuda.graph`, for recordings among others and beside other threads.

    No garbage is collected meanwhile: a graph destroyed there would end the recording, which PyTorch 2.9
    and later do not see to themselves. What other threads do on the GPU is their own.

    Args:
        graph: Is to hold what is launched.
        pool: Memory shared with other graphs; by default its own.
        stream: That records.

    Raises:
        RuntimeError: Something cannot be recorded; ``torch.OutOfMemoryError`` is one of these.

    Source: pytorch/pytorch#161037.
    """
    errors: list[RuntimeError] = []
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
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
    finally:
        if collects:
            gc.enable()


class _Pool(NamedTuple):
    """Memory that graphs share, by its number."""

    id: tuple[int, int]


class GraphRecorder:
    """Records what functions launch; its graphs must never run side by side.

    Kernels are compiled, and libraries take their workspaces, in a first call, which no graph may hold:
    :meth:`launch` what is to be recorded once before. What waits for the device cannot be recorded. Backward
    passes run in the calling thread: libraries have workspaces of each thread.
    """

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
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
        graph = torch.cuda.CUDAGraph()
        memory = self._pool if pool is None else pool
        with capture(graph, memory.id, self._stream), set_multithreading_enabled(False):
            result = run()
        return graph, result

    def memory(self) -> int:
        """Bytes taken on the device by tensors and graphs."""
        # what is only kept for later is given back by a recording anyway
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self._device)
