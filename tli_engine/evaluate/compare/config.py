"""The ``compare`` section of a configuration, and the run that each arm and seed is."""

from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    ValidationError,
    model_validator,
)

from tli_engine.config import (
    OF_TEXTS,
    PositiveInt,
    RunConfig,
    TrainConfig,
    explain,
    resolve_config,
)
from tli_engine.errors import ConfigError

Arm = Literal["full", "lora-all", "lora-early", "tli-then-lora-early", "joint"]
ARMS: tuple[Arm, ...] = ("full", "lora-all", "lora-early", "tli-then-lora-early", "joint")
# the run of the align objective that an arm goes on from; ``arms`` does not name it, ``set`` may
ALIGN = "tli"
_AFTER_TLI: Arm = "tli-then-lora-early"
# arms that differ in where they begin alone
_SAME_RATE: dict[str, Arm] = {_AFTER_TLI: "lora-early"}
# what is said of all weights is not of adapters, nor the other way round
_FULL = {"method": "full", "lora": {"init": None}, "train": {"lora_plus": 1.0}}
_LORA = {"method": "lora", "train": {"rounding": "master"}}
# what each arm makes of a run that is otherwise the same
_DIFFERENCES: dict[str, dict[str, Any]] = {
    "full": {"objective": "sft", **_FULL},
    "lora-all": {"objective": "sft", **_LORA, "lora": {"layers": "all"}},
    "lora-early": {"objective": "sft", **_LORA},
    "tli-then-lora-early": {"objective": "sft", **_LORA},
    "joint": {"objective": "joint", **_LORA},
    # what is said of the steps of texts is not of this one's
    ALIGN: {
        "objective": "align",
        "method": "lora",
        "train": TrainConfig().model_dump(mode="json", include=set(OF_TEXTS)),
    },
}


# what all arms are on, and measured by
_SHARED = (
    "model",
    "seed",
    "data",
    "words",
    "prompt",
    "sft.context",
    "align.layer",
    "align.pooling",
)


class CompareConfig(BaseModel):
    """What is compared, and on how many articles.

    ``set`` has what differs besides between arms, by arm: ``full: {train: {learning_rate: 1.0e-5}}``.
    ``tli`` there is the run of the align objective before ``tli-then-lora-early``. ``rates`` has learning
    rates by arm, ``full: [1.0e-5, 3.0e-5]``: each is tried with the first seed, and the one with the
    lowest loss on ``data.validation`` taken; ``tli-then-lora-early`` takes ``lora-early``'s.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    arms: Annotated[tuple[Arm, ...], Field(min_length=1)] = ARMS
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0, 1, 2)
    # articles that are summarised, at the most: of data.test, or else of data.validation
    articles: PositiveInt = 256
    max_new_tokens: PositiveInt = 64
    # articles summarised at the same time
    batch_size: PositiveInt = 16
    beams: PositiveInt = 1
    # seconds of training that each arm may take, all its runs together
    seconds: Annotated[float, Field(gt=0)] | None = None
    # whether adapters and models stay after they have been measured
    keep_weights: bool = True
    set: dict[Literal[Arm, "tli"], dict[str, Any]] = {}
    rates: dict[Arm, Annotated[tuple[PositiveFloat, ...], Field(min_length=2)]] | None = None

    @model_validator(mode="after")
    def _each_once(self) -> "CompareConfig":
        for name, values in (("arms", self.arms), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must be different ones")
        return self

    @model_validator(mode="after")
    def _each_rate_is_to_be_chosen(self) -> "CompareConfig":
        for arm, rates in (self.rates or {}).items():
            if arm not in self.arms:
                raise ValueError(f"rates.{arm}: is none of the arms {' '.join(self.arms)}")
            if arm == _AFTER_TLI:
                raise ValueError(f"rates.{arm}: takes that of {_SAME_RATE[arm]}; leave it out")
            if len(set(rates)) < len(rates):
                raise ValueError(f"rates.{arm} must be different ones")
            if "learning_rate" in self.set.get(arm, {}).get("train", {}):
                raise ValueError(
                    f"set.{arm}.train.learning_rate: is chosen of rates.{arm}; leave one out"
                )
        return self

    def rated(self, arm: str) -> Arm | None:
        """The arm whose chosen learning rate an arm takes; None where none is chosen for it."""
        found = _SAME_RATE.get(arm, arm)
        return next((a for a in self.rates or {} if a == found), None)

    @property
    def reference(self) -> Arm:
        """The arm that the others are held against: full fine-tuning, or else the first."""
        return "full" if "full" in self.arms else self.arms[0]


def split_config(values: dict[str, Any], where: str) -> tuple[RunConfig, CompareConfig]:
    """What all runs share, and the ``compare`` section.

    Raises:
        ConfigError: Names the file or recipe, the key, what is wrong and what is allowed.
    """
    values = dict(values)
    section = values.pop("compare", None)
    # each arm has its own; this one asks least of what all share
    shared = resolve_config({"objective": "sft"} | values, where)
    try:
        compare = CompareConfig.model_validate({} if section is None else section)
    except ValidationError as e:
        error: Any = e.errors()[0]
        text = f"compare.{explain(error, CompareConfig)}".replace(".(top level)", "")
        # pydantic's word for a name in a mapping, which stands before it
        text = text.replace(".[key]", "", 1)
        raise ConfigError(f"{where}: {text}") from None
    first = [ALIGN] if _AFTER_TLI in compare.arms else []
    # what is said of an arm that is not compared this time is looked at, too
    for arm in dict.fromkeys((*compare.arms, *first, *compare.set)):
        run = arm_config(shared, compare, arm, compare.seeds[0], Path())
        _require_alike(arm, run, shared.model_copy(update={"seed": compare.seeds[0]}))
    return shared, compare


def _require_alike(arm: str, run: RunConfig, shared: RunConfig) -> None:
    """Raise ``ConfigError`` if an arm is not on what all are on, or is not measured as all are."""
    for key in _SHARED:
        own, others = (reduce(getattr, key.split("."), config) for config in (run, shared))
        if own != others:
            raise ConfigError(f"compare.set.{arm}: {key} must be the same for all arms")


def arm_config(
    shared: RunConfig,
    compare: CompareConfig,
    arm: str,
    seed: int,
    out: Path,
    rate: float | None = None,
) -> RunConfig:
    """The run of one arm and seed.

    Args:
        shared: What all runs share.
        compare: The section.
        arm: Its name, or ``tli``.
        seed: Its seed.
        out: Folder of the comparison, where ``tli-then-lora-early`` finds the adapter it goes on from.
        rate: Its learning rate, if one is tried or was chosen.

    Raises:
        ConfigError: The arm cannot be had of this configuration.
    """
    values = shared.model_dump(mode="json") | {"seed": seed}
    changes = _merged(_DIFFERENCES[arm], compare.set.get(arm, {}))  # type: ignore[call-overload]
    if arm == "full" and shared.quantize == "nf4":
        changes.setdefault("quantize", "none")
    if rate is not None:
        changes = _merged(changes, {"train": {"learning_rate": rate}})
    if arm == _AFTER_TLI:
        changes = _merged({"lora": {"init": str(out / f"{ALIGN}-{seed}" / "adapter")}}, changes)
    length = {"epochs", "steps"} & changes.get("train", {}).keys()
    if len(length) == 1:
        values["train"] = values["train"] | {"epochs": None, "steps": None}
    return resolve_config(_merged(values, changes), f"arm {arm}")


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for key, change in changes.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(change, dict)
        merged[key] = _merged(old, change) if both else change  # type: ignore[arg-type]
    return merged
