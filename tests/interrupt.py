"""What happens to a run after one of its steps, for tests that interrupt it."""

import signal
from collections.abc import Callable
from typing import Any

from tli_engine.train.metrics import MetricsLog


def sigint() -> None:
    """What Ctrl-C sends."""
    signal.raise_signal(signal.SIGINT)


def at_step(step: int, action: Callable[[], None] = sigint) -> Callable[..., None]:
    """``MetricsLog.append`` that does something besides, once a step's figures are written."""
    append = MetricsLog.append

    def appended(self: MetricsLog, metrics: dict[str, Any]) -> None:
        append(self, metrics)
        if metrics["step"] == step:
            action()

    return appended
