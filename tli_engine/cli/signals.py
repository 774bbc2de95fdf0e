"""SIGINT and SIGTERM while training: finish the step, keep a checkpoint, then end."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tli_engine.distributed.world import World


class Stop:
    """Whether a signal has asked the run to end."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self) -> bool:
        """Whether to end now."""
        return self.signal is not None

    @property
    def exit_status(self) -> int:
        """What a shell expects of a process that a signal ended."""
        return 128 + (self.signal or 0)


class AgreedStop:
    """Whether all processes of a run are to end: after the same step, whichever got the signal.

    Args:
        stop: Of this process.
        world: All of them.
        every: Times that it is asked until they exchange what they know.
    """

    def __init__(self, stop: Stop, world: World, every: int) -> None:
        self._stop, self._world, self._every = stop, world, every
        self._asked, self._agreed = 0, False

    def __call__(self) -> bool:
        """Whether to end now; to be asked by all of them equally often."""
        self._asked += 1
        if self._asked % self._every == 0:
            self.settle()
        return self._agreed

    def settle(self) -> bool:
        """Exchange now."""
        (number,) = self._world.largest([self._stop.signal or 0])
        self._stop.signal = int(number) or None
        self._agreed = self._stop()
        return self._agreed


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Catch the first SIGINT or SIGTERM; a second one acts at once, as without this."""
    stop = Stop()
    previous = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.signal = number
        for s, handler in previous.items():
            signal.signal(s, handler)

    for s in previous:
        signal.signal(s, on_signal)
    try:
        yield stop
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)
