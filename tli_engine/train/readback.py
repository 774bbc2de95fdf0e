"""Numbers that a device has computed, on their way to the host."""

import time

import torch
from torch import Tensor

# seconds between two looks
_PAUSE = 1e-4


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

    def wait(self, limit: float | None = None) -> list[float]:
        """The numbers.

        Args:
            limit: Seconds to wait; None: as long as it takes.

        Raises:
            TimeoutError: They are not there by then.
        """
        if limit is not None:
            self._poll(limit)
        elif self._event is not None:
            self._event.synchronize()
        numbers: list[float] = self._values.tolist()
        return numbers

    def _poll(self, limit: float) -> None:
        end = time.monotonic() + limit
        while not self.is_there:
            if time.monotonic() > end:
                raise TimeoutError(f"a step's figures did not come within {limit:g} s")
            time.sleep(_PAUSE)
