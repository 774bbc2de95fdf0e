"""Learning rates that are tried before arms are compared, and which one each arm takes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import PositiveFloat

from tli_engine.evaluate.compare.config import CompareConfig
from tli_engine.evaluate.records import Record

# written last: a trial that has it is done
TRIED = "rate.json"


class Trial(NamedTuple):
    """A run that is made for its loss on unseen articles alone.

    Attributes:
        arm: Whose learning rate it tries.
        rate: That rate.
    """

    arm: str
    rate: float

    @property
    def name(self) -> str:
        """As ``--only`` has it."""
        return f"{self.arm}@{self.rate!r}"


class Tried(Record):
    """What a trial leaves.

    Attributes:
        arm: Whose learning rate was tried.
        learning_rate: That rate.
        seed: It was tried with.
        loss: The lowest on ``data.validation``, in nats a token; None where it ceased to be a number.
        step: At which it was.
    """

    arm: str
    learning_rate: PositiveFloat
    seed: int
    loss: float | None
    step: int | None


def trials(settings: CompareConfig) -> list[Trial]:
    """All that a comparison asks for, arm by arm."""
    return [Trial(arm, rate) for arm, rates in (settings.rates or {}).items() for rate in rates]


def chosen_rates(tried: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of each arm the rate with the lowest loss; of one that has none, none."""
    best: dict[str, Mapping[str, Any]] = {}
    for one in (t for t in tried if t["loss"] is not None):
        if one["arm"] not in best or one["loss"] < best[one["arm"]]["loss"]:
            best[one["arm"]] = one
    return {arm: one["learning_rate"] for arm, one in best.items()}


def rates_in_words(tried: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What was tried and taken, and of which arms a rate beyond those tried may be better."""
    if not tried:
        return
    said, ends = [], []
    for arm, rate in chosen_rates(tried).items():
        of_arm = sorted(
            (t for t in tried if t["arm"] == arm), key=lambda t: float(t["learning_rate"])
        )
        losses = ", ".join(f"{t['learning_rate']:g}: {_shown(t['loss'])}" for t in of_arm)
        said.append(f"{arm} {rate:g} ({losses})")
        if rate in (of_arm[0]["learning_rate"], of_arm[-1]["learning_rate"]):
            ends.append(arm)
    yield (
        "Learning rates were chosen by the lowest loss on the validation articles, in nats a token, "
        f"with seed {tried[0]['seed']}: {'; '.join(said)}."
    )
    if ends:
        yield (
            f"The rate of {' and '.join(ends)} is at an end of those that were tried: one beyond it may "
            "do better."
        )


def _shown(loss: float | None) -> str:
    return "not a number" if loss is None else f"{loss:.3f}"
