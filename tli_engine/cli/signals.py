"""SIGINT, SIGTERM and SIGHUP while training: finish the step, keep a checkpoint, then end."""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from tli_engine.distributed.world import World

# what a terminal that closes sends; Windows has none
_HANGUP: signal.Signals | None = getattr(signal, "SIGHUP", None)
ASKING = tuple(s for s in (signal.SIGINT, signal.SIGTERM, _HANGUP) if s is not None)
# what ends a process that one of them asked to stop
STOPPED = tuple(128 + s for s in ASKING)


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
    """Catch the first SIGINT, SIGTERM or SIGHUP; a second one acts at once, as without this.

    But a second SIGHUP does nothing: a closing terminal sends several. What is ignored already, such as
    SIGHUP under nohup, stays so.
    """
    stop = Stop()
    previous = {s: h for s in ASKING if (h := signal.getsignal(s)) != signal.SIG_IGN}
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def on_signal(number: int, frame: FrameType | None) -> None:
        if number == _HANGUP:
            _leave_closed(terminals)
        stop.signal = stop.signal or number
        for s, handler in previous.items():
            if s != _HANGUP:
                signal.signal(s, handler)

    for s in previous:
        signal.signal(s, on_signal)
    try:
        yield stop
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


def _leave_closed(terminals: Sequence[int]) -> None:
    """Have what is written to terminals that are closed go nowhere: it would be an error."""
    for descriptor in terminals:
        if not os.isatty(descriptor):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
