"""Processes that a step has no row for are told, with what to choose instead."""

from typing import Any

import pytest

from tli_engine.config import RunConfig
from tli_engine.train.checks import idle


def run_of(objective: str, batch_size: int, accumulate: int = 1) -> RunConfig:
    data: dict[str, Any] = {"pairs": "words.csv"} if objective == "align" else {"texts": "a.jsonl"}
    train = {"steps": 1, "batch_size": batch_size, "accumulate": accumulate}
    return RunConfig.model_validate(
        {"model": "m", "objective": objective, "data": data, "train": train}
    )


@pytest.mark.parametrize(
    ("run", "rows", "processes", "line"),
    [
        (run_of("sft", 1, 2), 2, 2, None),
        (run_of("align", 8), 8, 1, None),
        (
            run_of("sft", 1, 2),
            2,
            3,
            "too few rows for 3 processes: a step has 2, which leaves 1 of them idle; "
            "make train.batch_size times train.accumulate 3 or more, or start 2",
        ),
        (
            run_of("align", 2),
            2,
            4,
            "too few pairs for 4 processes: a step has 2, which leaves 2 of them idle; "
            "make train.batch_size 4 or more, or start 2",
        ),
        (
            run_of("sft", 8),
            3,
            4,
            "too few rows for 4 processes: a step has 3, which leaves 1 of them idle; "
            "start 3: the data has no more",
        ),
    ],
    ids=["as many", "one", "rows", "pairs", "data"],
)
def test_the_line_names_what_to_choose(
    run: RunConfig, rows: int, processes: int, line: str | None
) -> None:
    assert idle(run, rows, processes) == ([] if line is None else [line])
