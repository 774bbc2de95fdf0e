"""Tensors of fixed shapes that lie in one buffer on a device: one copy takes a step's data along."""

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor

# what the kernels' loads want at least
_ALIGNMENT = 16
# buffers that may be on their way to the device at once
_RING = 4

# dtype and shape of each tensor, by name
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
T = TypeVar("T")


class DeviceBuffer(Generic[T]):
    """A batch's tensors on a device, and how they get there.

    Args:
        make: Makes a batch of its tensors, by name.
        layout: Of the tensors.
        device: Where to.

    Attributes:
        batch: On the device; what was sent last.
    """

    def __init__(self, make: Callable[..., T], layout: Layout, device: torch.device) -> None:
        self._make, self._layout = make, layout
        self._starts, size = _lay_out(layout)
        pinned = device.type == "cuda"
        self._host = [torch.zeros(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(_RING)]
        self._copied: list[torch.cuda.Event | None] = [None] * _RING
        self._turn = 0
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self.batch = self._views(self._device)

    def fill(self) -> T:
        """The next batch's tensors on the host, to be written; waits only if four are on their way."""
        self._turn = (self._turn + 1) % _RING
        event = self._copied[self._turn]
        if event is not None:
            event.synchronize()
        return self._views(self._host[self._turn])

    def send(self) -> None:
        """Copy what was written last to :attr:`batch`, in the current stream."""
        self._device.copy_(self._host[self._turn], non_blocking=True)
        if self._device.is_cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._copied[self._turn] = event

    def _views(self, buffer: Tensor) -> T:
        views = {}
        for name, (dtype, shape) in self._layout.items():
            start, size = self._starts[name], _nbytes(dtype, shape)
            views[name] = buffer[start : start + size].view(dtype).view(shape)
        return self._make(**views)


def _nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _lay_out(layout: Layout) -> tuple[dict[str, int], int]:
    """Where each tensor begins, and bytes of all."""
    starts, start = {}, 0
    for name, (dtype, shape) in layout.items():
        starts[name] = start
        start += -(-_nbytes(dtype, shape) // _ALIGNMENT) * _ALIGNMENT
    return starts, start
