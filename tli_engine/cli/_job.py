"""What ``tli-engine train`` asks of an objective."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from tli_engine.distributed.world import World
from tli_engine.train.loop import Trainer
from tli_engine.train.prepare import Prepared
from tli_engine.train.sft_loop import SftTrainer
from tli_engine.train.sft_prepare import SftPrepared


class StepFigures(Protocol):
    """Figures of one step."""

    @property
    def step(self) -> int: ...

    @property
    def loss(self) -> float: ...

    def to_json(self) -> dict[str, float]: ...


RunTrainer = Trainer | SftTrainer


class Job(Protocol):
    """A prepared run, and what is made of it."""

    @property
    def run(self) -> Prepared | SftPrepared: ...

    @property
    def world(self) -> World: ...

    @property
    def steps_between_words(self) -> int:
        """Steps after which the processes of a run ask one another whether to stop."""

    def introduction(self) -> str:
        """A line on what is about to be trained."""

    def make_trainer(self, folder: Path, on_warning: Callable[[str], None]) -> RunTrainer:
        """A trainer at its first step."""

    def finish(
        self, trainer: Any, folder: Path, steps: list[dict[str, Any]], warnings: list[str]
    ) -> None:
        """Write the result, its manifest, and what it measures; called by every process."""
