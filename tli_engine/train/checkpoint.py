"""Checkpoints: everything a run needs to go on bit for bit, on disk whole or not at all."""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tli_engine.errors import UserError
from tli_engine.train.loop import Trainer
from tli_engine.train.manifest import problems, write_manifest

_NAME = re.compile(r"step-(\d{6,})")
_FILES = ("adapter_model.safetensors", "optimizer.safetensors", "state.json")


@dataclass(frozen=True)
class Found:
    """The newest whole checkpoint of a run, if there is one, and why newer ones are not it."""

    path: Path | None
    skipped: list[str]


def save_checkpoint(run: Path, trainer: Trainer, keep: int) -> Path:
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
    part = parent / f".{final.name}.part"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        adapter, optimizer = trainer.state()
        save_file(adapter, part / _FILES[0])
        save_file(optimizer, part / _FILES[1])
        (part / _FILES[2]).write_text(json.dumps({"step": trainer.step}) + "\n")
        for name in _FILES:
            _sync(part / name)
        write_manifest(part, _FILES)
        _sync(part)
        # a broken one of this name
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        _sync(parent)
        found = _checkpoints(run)
        for old in (*found[: found.index(final)], *found[found.index(final) + keep :]):
            shutil.rmtree(old)
    except (OSError, SafetensorError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"{final}: cannot be written: {reason}; earlier ones are whole") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return final


def find_checkpoint(run: Path) -> Found:
    """Look for the newest checkpoint that its manifest says is whole."""
    skipped: list[str] = []
    for path in _checkpoints(run):
        wrong = problems(path)
        if not wrong:
            return Found(path, skipped)
        skipped += wrong
    return Found(None, skipped)


def load_checkpoint(path: Path, trainer: Trainer) -> None:
    """Put a trainer where it was when the checkpoint was written.

    Raises:
        UserError: The checkpoint is of another model or other adapters.
    """
    adapter, optimizer = (load_file(path / name) for name in _FILES[:2])
    step = json.loads((path / _FILES[2]).read_text(encoding="utf-8"))["step"]
    try:
        trainer.restore(step, adapter, optimizer)
    except (KeyError, RuntimeError) as e:
        raise UserError(f"{path}: is not of this run's adapters: {e}") from None


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
