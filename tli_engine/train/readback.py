"""Numbers that a device has computed, on their way to the host."""

import torch
from torch import Tensor


class Readback:
    """A copy of a tensor, begun in the current stream; nothing waits for it before :meth:`wait`."""

    def __init__(self, values: Tensor) -> None:
        self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        self._values.copy_(values, non_blocking=True)
        self._event: torch.cuda.Event | None = None
        if values.is_cuda:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    @property
    def is_there(self) -> bool:
        """Whether :meth:`wait` would not wait."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> list[float]:
        """The numbers."""
        if self._event is not None:
            self._event.synchronize()
        numbers: list[float] = self._values.tolist()
        return numbers
