"""``state.json``: the step of a checkpoint, and what else a trainer has to remember."""

import json
from pathlib import Path
from typing import Any

from tli_engine.errors import UserError

STATE = "state.json"


class NotesError(ValueError):
    """A trainer's notes lack something that it wrote into them."""


def read_state(folder: Path) -> dict[str, Any]:
    """The step of a checkpoint, ``step``, and the trainer's notes.

    Raises:
        UserError: They are not there, are no JSON, or lack what every checkpoint has.
    """
    try:
        values = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise unlike(folder, getattr(e, "strerror", None) or str(e)) from None
    if not isinstance(values, dict) or not isinstance(values.get("step"), int):
        raise unlike(folder, "it has no step")
    best = values.get("best", {})
    if not isinstance(best, dict) or ("loss" in best and "step" not in best):
        raise unlike(folder, "its best has no step")
    return values


def unlike(folder: Path, reason: str) -> UserError:
    """The error of a checkpoint whose state is none."""
    return UserError(
        f"{folder / STATE}: is not what training wrote: {reason}; move {folder} away to go on without it"
    )
