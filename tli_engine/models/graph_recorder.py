"""Launches recorded as CUDA graphs."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

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


class GraphRecorder:
    """Records what functions launch; its graphs must never run side by side.

    Kernels are compiled, and libraries take their workspaces, in a first call, which no graph may hold:
    :meth:`launch` what is to be recorded once before. What waits for the device cannot be recorded.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = self.new_pool()

    def new_pool(self) -> Any:
        """Memory for graphs of which another's replay must not overwrite anything."""
        return torch.cuda.graph_pool_handle()

    def launch(self, run: Callable[[], T]) -> T:
        """Run in the stream that records, between what the current stream does before and after."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = run()
        current.wait_stream(self._stream)
        return result

    def record(self, run: Callable[[], T], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, T]:
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
        with capture(graph, self._pool if pool is None else pool, self._stream):
            result = run()
        return graph, result

    def memory(self) -> int:
        """Bytes taken on the device by tensors and graphs."""
        # what is only kept for later is given back by a recording anyway
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self._device)
