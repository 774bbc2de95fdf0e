"""Which examples make up a batch of fine-tuning: a function of seed, epoch and number."""

from itertools import count
from typing import Any

from tli_engine.config import RunConfig, TrainConfig
from tli_engine.data.packing import rows_of_epoch
from tli_engine.distributed.world import World

# examples of a row, rows of a batch, batches of a step
Batch = list[list[int]]


def rows_at_once(train: TrainConfig, ranks: int) -> int:
    """Rows of a full step that each of so many ranks takes at once."""
    return min(train.batch_size, -(-train.batch_size * train.accumulate // ranks))


def batches_of_rank(batches: list[Batch], batch_size: int, world: World) -> list[Batch]:
    """A rank's share of the rows of a step, or of a measurement.

    Each row is in one rank's share; all ranks have the same number of batches, so that they meet in
    each. An empty one is of a rank that has no row left.

    Args:
        batches: Of all ranks.
        batch_size: Rows that a rank takes at once.
        world: The ranks; alone, the batches are as they were.
    """
    if world.size == 1:
        return batches
    rows = [row for batch in batches for row in batch]
    own = rows[world.rank :: world.size]
    count = -(-len(rows) // (world.size * batch_size))
    return [own[i * batch_size : (i + 1) * batch_size] for i in range(count)]


class SftOrder:
    """The batches of every step; there is no state to save.

    A step takes ``train.accumulate`` batches of ``train.batch_size`` rows; the last step of an epoch
    what is left. How many rows an epoch has depends on how its examples fit together.

    Attributes:
        total_steps: Of the run.
    """

    def __init__(self, lengths: Any, config: RunConfig) -> None:
        self._lengths, self._config = lengths, config
        # rows of the latest epoch asked for, and where each epoch up to it ends, in steps
        self._latest: tuple[int, Batch] = (-1, [])
        self._ends: list[int] = []
        train = config.train
        self.total_steps = train.steps or self._end(train.epochs or 1)

    def epoch(self, step: int) -> int:
        """Epoch of a step; both count from 0."""
        return next(e for e in count() if self._end(e + 1) > step)

    def batches(self, step: int) -> list[Batch]:
        """The batches whose gradients are added up in a step, counted from 0 over all epochs."""
        train, epoch = self._config.train, self.epoch(step)
        rows, number = self._rows(epoch), step - self._end(epoch)
        size = train.batch_size * train.accumulate
        taken = rows[number * size : (number + 1) * size]
        return [taken[i : i + train.batch_size] for i in range(0, len(taken), train.batch_size)]

    def _rows(self, epoch: int) -> Batch:
        if self._latest[0] != epoch:
            sft, seed = self._config.sft, self._config.seed
            rows = rows_of_epoch(self._lengths, sft.context, seed, epoch, sft.packing)
            self._latest = epoch, rows
        return self._latest[1]

    def _end(self, epochs: int) -> int:
        """Steps of the first ``epochs`` epochs."""
        size = self._config.train.batch_size * self._config.train.accumulate
        while len(self._ends) < epochs:
            steps = -(-len(self._rows(len(self._ends))) // size)
            self._ends.append(steps + (self._ends[-1] if self._ends else 0))
        return self._ends[epochs - 1] if epochs else 0
