"""Launches recorded as CUDA graphs, which share their memory."""

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


class GraphRecorder:
    """Records what functions launch; its graphs must never run side by side.

    Kernels are compiled, and libraries take their workspaces, in a first call, which no graph may hold:
    :meth:`launch` what is to be recorded once before. What waits for the device cannot be recorded.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def launch(self, run: Callable[[], T]) -> T:
        """Run in the stream that records, between what the current stream does before and after."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = run()
        current.wait_stream(self._stream)
        return result

    def record(self, run: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        """The graph, and what ``run`` returned: tensors that each replay writes. It is not run yet.

        Raises:
            RuntimeError: Something cannot be recorded; ``torch.OutOfMemoryError`` is one of these.
        """
        graph, errors = torch.cuda.CUDAGraph(), []
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                try:
                    result = run()
                except RuntimeError as error:
                    errors.append(error)
                    raise
        except RuntimeError:
            # what ends a recording that failed raises too, and would hide the cause
            if errors:
                raise errors[0] from None
            raise
        return graph, result
