"""What is compared, and where: the parts of a comparison, their folders and configurations."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tli_engine.cli._compare_lock import LOCKS
from tli_engine.cli._compare_made import Present, check_made, read_made
from tli_engine.cli._compare_processes import file_name
from tli_engine.config import RunConfig
from tli_engine.data.texts import Texts, has_articles, read_texts
from tli_engine.errors import UserError
from tli_engine.evaluate.compare.config import ALIGN, CompareConfig, arm_config
from tli_engine.evaluate.compare.figures import RESULT
from tli_engine.evaluate.compare.gather import MADE_FROM
from tli_engine.evaluate.compare.rates import TRIED, Trial, Tried, chosen_rates, trials
from tli_engine.evaluate.records import read_record, unreadable

# the part that trains nothing
BASE = "base"
# folder of the trials of learning rates
RATES = "rates"


@dataclass(frozen=True)
class Comparison:
    """What is compared, and where.

    Attributes:
        shared: What all runs share.
        settings: The ``compare`` section.
        out: Folder of the comparison; each part has one in it.
        side_by_side: Parts that may run at the same time, this one among them.
    """

    shared: RunConfig
    settings: CompareConfig
    out: Path
    side_by_side: int = 1

    @property
    def parts(self) -> list[str]:
        """``base``, then ``ARM:SEED``, all arms of a seed together."""
        settings = self.settings
        return [BASE, *(f"{arm}:{seed}" for seed in settings.seeds for arm in settings.arms)]

    @cached_property
    def trials(self) -> dict[str, Trial]:
        """By name, ``ARM@RATE``, the learning rates to try before the parts that take them."""
        return {trial.name: trial for trial in trials(self.settings)}

    def folder(self, name: str) -> Path:
        """Of a part or a trial."""
        return (self.out / RATES if name in self.trials else self.out) / file_name(name)

    def lock(self, name: str) -> Path:
        """The file that a process holds while it makes a part or a trial."""
        return self.out / LOCKS / file_name(name)

    @cached_property
    def tried(self) -> list[dict[str, Any]]:
        """What the trials left.

        Raises:
            UserError: One is yet to be made, or was made otherwise than it would be now.
        """
        if waiting := [name for name in self.trials if not self.is_done(name)]:
            raise UserError(
                f"compare.rates: {waiting[0]} has not been tried in {self.out} yet, by which a learning "
                f"rate is chosen; compare --only {waiting[0]} does"
            )
        return [self.check_trial(name) for name in self.trials]

    def check_trial(self, name: str) -> dict[str, Any]:
        """What a trial left that is done.

        Raises:
            UserError: It cannot be read, or was not made as it would be now.
        """
        folder = self.folder(name)
        found = read_record(folder / TRIED, Tried, mend(name))
        made = read_made(folder / TRIED, found, 1, mend(name))
        if made is None:
            raise unreadable(folder / TRIED, f"{MADE_FROM}: is required", mend(name))
        check_made(folder, made, [self.trial_config(name)], self.present)
        return found

    def trial_config(self, name: str) -> RunConfig:
        """Of a trial's run."""
        arm, rate = self.trials[name]
        seed = self.settings.seeds[0]
        return self._limited(arm_config(self.shared, self.settings, arm, seed, self.out, rate))

    def config(self, name: str, seed: int, spent: float = 0.0) -> RunConfig:
        """Of a run, for whose arm there were ``spent`` seconds of training before."""
        rated = self.settings.rated(name)
        rate = None if rated is None else chosen_rates(self.tried).get(rated)
        if rated is not None and rate is None:
            raise UserError(
                f"compare.rates.{rated}: with none is the loss a number; give lower ones"
            )
        config = arm_config(self.shared, self.settings, name, seed, self.out, rate)
        return self._limited(config, spent)

    def _limited(self, config: RunConfig, spent: float = 0.0) -> RunConfig:
        if self.settings.seconds is None:
            return config
        # a run has one step at least
        left = max(self.settings.seconds - spent, 1e-3)
        return config.model_copy(
            update={"train": config.train.model_copy(update={"seconds": left})}
        )

    def runs(self, part: str) -> list[str]:
        """Names of the runs of a part, each trained on from the one before; none of the base."""
        arm = part.rpartition(":")[0]
        return [ALIGN, arm] if arm == "tli-then-lora-early" else [arm] if arm else []

    def folders(self, part: str) -> list[Path]:
        """Of the runs of a part; the last one is the part's own."""
        seed = part.rpartition(":")[2]
        return [self.folder(f"{name}:{seed}") for name in self.runs(part)]

    def configs(self, part: str) -> list[RunConfig]:
        """Of the runs of a part; of the base, what all share."""
        seed = part.rpartition(":")[2]
        return [self.config(name, int(seed)) for name in self.runs(part)] or [self.shared]

    @cached_property
    def present(self) -> Present:
        """The files that there are now."""
        return Present(self.shared)

    @cached_property
    def test_digest(self) -> str:
        """SHA-256 of the articles that are summarised."""
        return self.test_texts().digest()

    def is_done(self, name: str) -> bool:
        """Whether a part or a trial has its figures."""
        return (self.folder(name) / (TRIED if name in self.trials else RESULT)).is_file()

    def test_texts(self) -> Texts:
        """The articles that are summarised.

        Raises:
            UserError: The configuration names none.
        """
        split = "test" if has_articles(self.shared.data, "test") else "validation"
        texts = read_texts(self.shared.data, split)  # type: ignore[arg-type]
        if texts is None:
            raise UserError("data.test: a comparison needs articles that no run is trained on")
        return texts.first(self.settings.articles)


def mend(part: str) -> str:
    """What to do about damaged figures of a part."""
    return f"delete it and make {part} again, by compare --only {part}"
