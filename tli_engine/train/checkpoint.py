"""Checkpoints: everything a run needs to go on bit for bit, on disk whole or not at all."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tli_engine.errors import UserError
from tli_engine.train.manifest import problems, write_manifest

_NAME = re.compile(r"step-(\d{6,})")
_BEST = "best"
_FILES = ("adapter_model.safetensors", "optimizer.safetensors", "state.json")


class Resumable(Protocol):
    """A trainer, as far as a checkpoint knows it."""

    step: int

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Trained tensors, and the optimizer's."""

    def notes(self) -> dict[str, Any]:
        """What else it has to remember, as JSON."""

    def restore(
        self,
        step: int,
        tensors: dict[str, Tensor],
        statistics: dict[str, Tensor],
        notes: Mapping[str, Any],
    ) -> None:
        """Go back to a step."""


@dataclass(frozen=True)
class Found:
    """The newest whole checkpoint of a run, if there is one, and why newer ones are not it."""

    path: Path | None
    skipped: list[str]


def save_checkpoint(run: Path, trainer: Resumable, keep: int) -> Path:
    """Write ``checkpoints/step-N``; of the earlier ones the last ``keep - 1`` stay.

    The files are written to a hidden folder, synced, listed in a manifest, and the folder renamed:
    a crash at any moment leaves the earlier checkpoints and no half one under this name. Those of
    later steps, which an interrupted run wrote before it was resumed from an earlier one, go.

    Raises:
        UserError: The disk is full, or cannot be written.
    """
    parent = run / "checkpoints"
    final = parent / f"step-{trainer.step:06d}"
    if final.is_dir() and not problems(final):
        return final
    tensors, optimizer = trainer.state()
    state = {"step": trainer.step, **trainer.notes()}
    _write(final, {_FILES[0]: tensors, _FILES[1]: optimizer}, state)
    found = _checkpoints(run)
    for old in (*found[: found.index(final)], *found[found.index(final) + keep :]):
        shutil.rmtree(old, ignore_errors=True)
    return final


def save_best(run: Path, trainer: Resumable) -> None:
    """Write ``best``: the trained tensors as they are now, in place of earlier ones.

    Raises:
        UserError: As :func:`save_checkpoint`.
    """
    tensors, _ = trainer.state()
    _write(run / _BEST, {_FILES[0]: tensors}, {"step": trainer.step})


def load_best(run: Path) -> dict[str, Tensor] | None:
    """The tensors that :func:`save_best` wrote; ``None`` where it did not.

    Raises:
        UserError: They are not whole.
    """
    folder = run / _BEST
    if not folder.is_dir():
        return None
    if wrong := problems(folder):
        raise UserError(f"{wrong[0]}; the best checkpoint is lost, the last one is whole")
    return load_file(folder / _FILES[0])


def _write(final: Path, tensors: Mapping[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """Write a folder of tensors and a ``state.json``, whole or not at all."""
    part = final.parent / f".{final.name}.part"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name, of_file in tensors.items():
            save_file(of_file, part / name)
        (part / _FILES[2]).write_text(json.dumps(state) + "\n")
        names = [*tensors, _FILES[2]]
        for name in names:
            _sync(part / name)
        write_manifest(part, names)
        _sync(part)
        # a broken one of this name, or an earlier best
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        _sync(final.parent)
    except (OSError, SafetensorError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"{final}: cannot be written: {reason}; earlier ones are whole") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def find_checkpoint(run: Path) -> Found:
    """Look for the newest checkpoint that its manifest says is whole."""
    skipped: list[str] = []
    for path in _checkpoints(run):
        wrong = problems(path)
        if not wrong:
            return Found(path, skipped)
        skipped += wrong
    return Found(None, skipped)


def load_checkpoint(path: Path, trainer: Resumable) -> None:
    """Put a trainer where it was when the checkpoint was written.

    Raises:
        UserError: The checkpoint is of another model or other adapters.
    """
    tensors, optimizer = (load_file(path / name) for name in _FILES[:2])
    notes = json.loads((path / _FILES[2]).read_text(encoding="utf-8"))
    try:
        trainer.restore(notes.pop("step"), tensors, optimizer, notes)
    except (KeyError, RuntimeError) as e:
        raise UserError(f"{path}: is not of this run's tensors: {e}") from None


def _checkpoints(run: Path) -> list[Path]:
    """Newest first."""
    folder = run / "checkpoints"
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
