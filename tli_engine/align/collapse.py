"""Notices while training that all words are becoming alike, true pairs or not."""

import math
from collections import deque

_WINDOW = 20
# true and random pairs closer than this cannot be told apart by cosine
_SEPARATION = 0.02
# share of the way from the first steps' random cosine to 1
_WAY = 0.5


class CollapseDetector:
    """Watches the raw cosine of true and of random pairs in each batch."""

    def __init__(self, margin: float | None) -> None:
        """Take the margin of a triplet loss, or ``None`` for a loss without one."""
        self._margin = margin
        self._start: list[float] = []
        self._recent: deque[tuple[float, float, float]] = deque(maxlen=_WINDOW)
        self.warning: str | None = None

    def update(self, loss: float, cosine_true: float, cosine_random: float) -> str | None:
        """Take one step's figures; return a line the first time they show a collapse."""
        if math.isnan(cosine_random):
            # a batch without a mismatched pair tells nothing
            return None
        if len(self._start) < _WINDOW:
            self._start.append(cosine_random)
        self._recent.append((loss, cosine_true, cosine_random))
        if self.warning is not None or len(self._recent) < _WINDOW:
            return None
        loss, true, random = (sum(column) / _WINDOW for column in zip(*self._recent, strict=True))
        start = sum(self._start) / len(self._start)
        risen = random - start > _WAY * (1 - start) and random > start
        if not risen or true - random > _SEPARATION:
            return None
        self.warning = (
            f"collapse: random pairs' cosine rose from {start:.3f} to {random:.3f}, true pairs' is "
            f"{true:.3f}: every word becomes alike"
        )
        if self._margin is not None and abs(loss - self._margin) < 0.05 * self._margin:
            self.warning += f"; the loss sits at its margin, {self._margin}"
        return self.warning
