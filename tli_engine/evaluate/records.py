"""JSON files that one command leaves and another reads: what they must hold, checked as they are read."""

import json
from pathlib import Path
from textwrap import shorten
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tli_engine.config import explain
from tli_engine.errors import UserError

# letters of what is wrong that are shown: it may name all that a key holds
_SHOWN = 200


class Record(BaseModel):
    """Keys that are read; others may stand beside them. No value is taken for one of another type."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


class _Articles(Record):
    name: str
    count: int
    sha256: str


class Predictions(Record):
    """What summaries are, as :func:`tli_engine.evaluate.summaries.predictions_record` says it."""

    sha256: str
    articles: _Articles
    decoding: dict[str, Any]


class _ByTraining(Record):
    validation: dict[str, Any] | None = None


class Evaluation(Record):
    """``evaluation.json`` of any run: of word pairs, of summaries, of both; measured once or often."""

    loss: _ByTraining = _ByTraining()
    throughput: dict[str, float | None] = {}
    baselines: dict[str, Any] = {}
    warnings: list[str] = []
    # earlier versions did not record it
    predictions: Predictions | None = None


def read_evaluation(folder: Path) -> dict[str, Any]:
    """What a run's ``evaluation.json`` holds; nothing where there is none.

    Raises:
        UserError: It is damaged.
    """
    path = folder / "evaluation.json"
    mend = f"delete it and measure the run again, by evaluate {folder}"
    return read_record(path, Evaluation, mend) if path.is_file() else {}


def read_record(path: Path, kind: type[Record], mend: str) -> dict[str, Any]:
    """Read a JSON file whose keys are those of ``kind``.

    Args:
        path: Of the file.
        kind: What is read of it.
        mend: What to do about a file that is damaged.

    Raises:
        UserError: It is missing, no JSON, lacks a key, or has a value of another type.
    """
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind.model_validate(values)
    except OSError as e:
        raise unreadable(path, e.strerror or str(e), mend) from None
    except ValidationError as e:
        raise unreadable(path, explain(e.errors()[0], kind), mend) from None
    except (ValueError, RecursionError) as e:
        raise unreadable(path, f"not JSON: {e}", mend) from None
    return values


def unreadable(path: Path, reason: str, mend: str) -> UserError:
    """The error of a damaged file, in one line."""
    reason = shorten(reason, _SHOWN, placeholder=" …")
    return UserError(f"{path}: cannot be read: {reason}; {mend}")
