"""What ``result.json`` of a part of a comparison must hold for a report to be made of it."""

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from tli_engine.evaluate.records import Record

# written last: a part that has it is done
RESULT = "result.json"
_Interval = Annotated[list[float | None], Field(min_length=2, max_length=2)]
# the score by which the conclusions tell whether unseen pairs find each other better
SHOWN_SCORE = "centred"


class _Test(Record):
    sha256: str


class _Predictions(Record):
    sha256: str | None = None
    decoding: dict[str, Any] = Field(default_factory=dict)


class Figures(Record):
    """Of every part, the base model among them."""

    test: _Test
    versions: dict[str, str]
    # earlier versions did not record it
    predictions: _Predictions = _Predictions()


class _OneWay(Record):
    mrr: float


class _Retrieval(_OneWay):
    # of a single pair there are no random ones
    separation: float | None
    reverse: _OneWay


class _MrrTest(Record):
    ci95: _Interval


class _RowTests(Record):
    mrr: _MrrTest


class _Row(Record):
    layer: int
    pooling: str
    presentation: str
    score: str
    split: str
    before: _Retrieval
    after: _Retrieval
    tests: _RowTests


class _OfLayer(Record):
    separation: float | None
    mrr: float


class _Layer(Record):
    layer: int
    before: _OfLayer
    after: _OfLayer


class _Alignment(Record):
    rows: list[_Row]
    linear_head: list[_Row]
    layers: list[_Layer]
    split: str
    pairs: PositiveInt

    @model_validator(mode="after")
    def _has_what_is_shown(self) -> Self:
        shown = [row for row in self.rows if (row.split, row.score) == (self.split, SHOWN_SCORE)]
        if not shown:
            raise ValueError(f"there is no row of split {self.split} and score {SHOWN_SCORE}")
        if self.split not in {row.split for row in self.linear_head}:
            raise ValueError(f"linear_head has no row of split {self.split}")
        # of a single pair there is none
        if self.pairs > 1 and any(None in row.tests.mrr.ci95 for row in shown):
            raise ValueError(f"the interval of {self.pairs} pairs has no ends")
        return self


class _Loss(Record):
    before: float | None
    after: float | None


class _Speed(Record):
    tokens_per_s: float


class _Losses(Record):
    validation: _Loss | None


class OfTraining(Record):
    """What a part takes over from its run's ``evaluation.json``."""

    throughput: _Speed
    loss: _Losses
    warnings: list[str]


class RunFigures(Figures):
    """Of a part that trains."""

    seed: int
    side_by_side: PositiveInt
    energy_joules: float | None
    method: str
    objective: str
    layers: str
    trainable_parameters: PositiveInt
    device: str
    device_name: str
    base_model: str | None
    steps: int
    tokens_per_s: float
    peak_mib: PositiveFloat
    wall_seconds: PositiveFloat
    loss: _Loss | None
    warnings: list[str]
    generation: _Speed
    alignment: _Alignment


def measured_at(result: Mapping[str, Any]) -> list[list[tuple[Any, ...]]]:
    """Layers, scores and splits of a part's alignment: those of all parts that train are the same."""
    found = result["alignment"]
    rows = (
        [(r["layer"], r["score"], r["split"]) for r in found[k]] for k in ("rows", "linear_head")
    )
    return [*rows, [(of_layer["layer"],) for of_layer in found["layers"]]]
