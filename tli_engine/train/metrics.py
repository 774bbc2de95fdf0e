"""Figures of each step: ``metrics.jsonl``, and TensorBoard if it is asked for."""

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tli_engine.errors import UserError
from tli_engine.train.run_folder import plain_json, write_text

_FILE = "metrics.jsonl"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The whole lines of ``metrics.jsonl``; a last one that a crash cut short is left out.

    Raises:
        UserError: Another line is no step's figures.
    """
    path = run / _FILE
    steps = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            values: Any = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            values = None
        if not isinstance(values, dict) or not {"step", "loss"} <= values.keys():
            raise UserError(
                f"{path}: line {number} is no step's figures; restore the file, or train the run again"
            )
        steps.append({k: math.nan if v is None else v for k, v in values.items()})
    return steps


class MetricsLog:
    """Appends one object a step; a resumed run first drops what came after its checkpoint."""

    def __init__(self, run: Path, kept: list[dict[str, Any]], tensorboard: bool) -> None:
        self.steps = list(kept)
        write_text(run / _FILE, "".join(json.dumps(plain_json(step)) + "\n" for step in kept))
        self._file = (run / _FILE).open("a", encoding="utf-8")
        self._writer = _tensorboard(run, len(kept) + 1) if tensorboard else None

    def append(self, step: dict[str, Any]) -> None:
        """Write a step, and hand it to the operating system at once."""
        self.steps.append(step)
        self._file.write(json.dumps(plain_json(step)) + "\n")
        self._file.flush()
        if self._writer is not None:
            for key, value in step.items():
                if key not in ("step", "epoch") and math.isfinite(value):
                    self._writer.add_scalar(key, value, step["step"])

    def sync(self) -> None:
        """Wait until all steps are on disk; a checkpoint must not outlive its metrics."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def check_tensorboard() -> None:
    """Refuse ``train.tensorboard`` where it cannot be written.

    Raises:
        UserError: TensorBoard is not installed.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise UserError(
            "train.tensorboard: TensorBoard is not installed; pip install 'tli-engine[tensorboard]'"
        ) from None


def _tensorboard(run: Path, first_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(run / "tensorboard", purge_step=first_step)
