"""Checkpoints: everything a run needs to go on bit for bit, on disk whole or not at all."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tli_engine.distributed.fully_sharded import fill, load_shards, save_shards, stored
from tli_engine.distributed.world import ALONE, World
from tli_engine.errors import UserError
from tli_engine.train.checkpoint_state import STATE, NotesError, read_state, unlike
from tli_engine.train.joined_names import joined_keys, parts_of
from tli_engine.train.manifest import problems, write_manifest

_NAME = re.compile(r"step-(\d{6,})")
_BEST = "best"
_FILES = ("adapter_model.safetensors", "optimizer.safetensors")


@dataclass(frozen=True)
class Shards:
    """What is trained, of which each rank holds a share.

    Attributes:
        tensors: By name; loading overwrites them.
        statistics: Of the optimizer, as ``<tensor>/<statistic>``; likewise.
        group: Where ranks wait for one another, whatever time files take.
    """

    tensors: Mapping[str, Tensor]
    statistics: dict[str, Tensor]
    group: Any = None


class Resumable(Protocol):
    """A trainer, as far as a checkpoint knows it."""

    step: int

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Trained tensors, and the optimizer's."""

    def shards(self) -> Shards | None:
        """Both as shares, where each rank has one; None where each has all."""

    def notes(self) -> dict[str, Any]:
        """What else it has to remember, as JSON."""

    def restore(
        self,
        step: int,
        tensors: dict[str, Tensor],
        statistics: dict[str, Tensor],
        notes: Mapping[str, Any],
    ) -> None:
        """Go back to a step.

        Raises:
            KeyError: Tensors are not those of this model.
            RuntimeError: One is of another shape.
            NotesError: The notes lack something.
        """


@dataclass(frozen=True)
class Found:
    """The newest whole checkpoint of a run, if there is one, and why newer ones are not it."""

    path: Path | None
    skipped: list[str]


def save_checkpoint(run: Path, trainer: Resumable, keep: int, world: World = ALONE) -> Path:
    """Write ``checkpoints/step-N``; of the earlier ones the last ``keep - 1`` stay.

    The files are written to a hidden folder, synced, listed in a manifest, and the folder renamed:
    a crash at any moment leaves the earlier checkpoints and no half one under this name. Those of
    later steps, which an interrupted run wrote before it was resumed from an earlier one, go.

    All ranks call it; where each holds all, the first one writes.

    Raises:
        UserError: The disk is full, or cannot be written.
    """
    parent = run / "checkpoints"
    final = parent / f"step-{trainer.step:06d}"
    shards = trainer.shards()
    if shards is None and not world.is_first:
        return final
    there = world.is_first and final.is_dir() and not problems(final)
    # a partner that was slow to look must not see it written
    if not (there if shards is None else world.share(there)):
        state = {"step": trainer.step, **trainer.notes()}
        if shards is None:
            tensors, optimizer = trainer.state()
            _write(final, {_FILES[0]: tensors, _FILES[1]: optimizer}, state)
        else:
            _write_shards(final, {**shards.tensors, **shards.statistics}, state, world)
    found = checkpoints(run) if world.is_first else [final]
    for old in (*found[: found.index(final)], *found[found.index(final) + keep :]):
        shutil.rmtree(old, ignore_errors=True)
    return final


def save_best(run: Path, trainer: Resumable, world: World = ALONE) -> None:
    """Write ``best``: the trained tensors as they are now, in place of earlier ones.

    All ranks call it, as :func:`save_checkpoint`.

    Raises:
        UserError: As :func:`save_checkpoint`.
    """
    shards, state = trainer.shards(), {"step": trainer.step}
    if shards is not None:
        _write_shards(run / _BEST, shards.tensors, state, world)
    elif world.is_first:
        tensors, _ = trainer.state()
        _write(run / _BEST, {_FILES[0]: tensors}, state)


def load_best(run: Path, trainer: Resumable, world: World = ALONE) -> Mapping[str, Tensor] | None:
    """The tensors that :func:`save_best` wrote; ``None`` where it did not.

    Where ranks hold shares, the trainer's own tensors, overwritten. All ranks call it; the first one looks
    whether they are whole.

    Raises:
        UserError: They are not whole.
    """
    folder = run / _BEST

    def look() -> bool:
        there = world.is_first and folder.is_dir()
        if there and (wrong := problems(folder)):
            raise UserError(f"{wrong[0]}; the best checkpoint is lost, the last one is whole")
        return there

    if not world.share(world.together(look)):
        return None
    if (shards := trainer.shards()) is None:
        return load_file(folder / _FILES[0])
    load_shards(folder, shards.tensors, shards.group)
    return shards.tensors


def _write(final: Path, tensors: Mapping[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """Write a folder of tensors and a ``state.json``, whole or not at all."""
    part = _part_of(final)
    with _whole_or_not(final):
        _begin(part)
        for name, of_file in tensors.items():
            save_file(of_file, part / name)
        _complete(part, final, state)


def _write_shards(
    final: Path, tensors: Mapping[str, Tensor], state: dict[str, Any], world: World
) -> None:
    """Write a folder of every rank's shares and a ``state.json``, whole or not at all."""
    part = _part_of(final)

    def first(work: Callable[[], None]) -> None:
        def guarded() -> None:
            if world.is_first:
                with _whole_or_not(final, keep_part=True):
                    work()

        world.together(guarded)

    def write() -> None:
        with _whole_or_not(final, keep_part=True):
            # a slow disk is no lost partner
            save_shards(part, tensors, world.patient)

    try:
        first(lambda: _begin(part))
        world.together(write)
        first(lambda: _complete(part, final, state))
    finally:
        # of what could not be written: a full disk would be left full
        if world.is_first:
            shutil.rmtree(part, ignore_errors=True)


def _part_of(final: Path) -> Path:
    return final.parent / f".{final.name}.part"


def _begin(part: Path) -> None:
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)


def _complete(part: Path, final: Path, state: dict[str, Any]) -> None:
    """Write the state and the manifest of what is in ``part``, and give it its name."""
    (part / STATE).write_text(json.dumps(state) + "\n")
    names = sorted(path.name for path in part.iterdir())
    for name in names:
        _sync(part / name)
    write_manifest(part, names)
    _sync(part)
    # a broken one of this name, or an earlier best
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    _sync(final.parent)


@contextmanager
def _whole_or_not(final: Path, *, keep_part: bool = False) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"{final}: cannot be written: {reason}; earlier ones are whole") from None
    finally:
        if not keep_part:
            shutil.rmtree(_part_of(final), ignore_errors=True)


def find_checkpoint(run: Path) -> Found:
    """Look for the newest checkpoint that its manifest says is whole.

    Raises:
        UserError: A file of one cannot be read.
    """
    skipped: list[str] = []
    for path in checkpoints(run):
        wrong = problems(path)
        if not wrong:
            return Found(path, skipped)
        skipped += wrong
    return Found(None, skipped)


def load_checkpoint(path: Path, trainer: Resumable, world: World = ALONE) -> None:
    """Put a trainer where it was when the checkpoint was written.

    All ranks call it; the first one looks whether ``best`` is whole. What is wrong on one ends all.

    Raises:
        UserError: The checkpoint is of another model or other adapters, or cannot be read.
        StoppedElsewhere: It is so on another rank.
    """
    shards = trainer.shards()

    def read() -> tuple[dict[str, Any], str, int | None]:
        notes = read_state(path)
        with _readable(path):
            there = {} if shards is None else stored(path)
        own = _best_step(path.parent.parent / _BEST) if world.is_first else None
        return notes, json.dumps(notes) + repr(sorted(there.items())), own

    notes, seen, own = world.together(read)
    # one that lacks a file would leave the others waiting
    world.check_alike(f"{path}: what is there", seen, "all machines must see the same files")
    found, noted = world.share(own), notes.get("best", {})
    if "loss" in noted and noted["step"] != found:
        # a later one, of an end of the run that was lost, took its place: the next is the best
        notes["best"] = {name: noted[name] for name in ("before",) if name in noted}
    world.together(lambda: _restore(path, trainer, shards, notes))


def _restore(path: Path, trainer: Resumable, shards: Shards | None, notes: dict[str, Any]) -> None:
    with _readable(path):
        if shards is not None:
            _fill(path, shards)
            tensors, optimizer = dict(shards.tensors), shards.statistics
        elif (path / _FILES[0]).is_file():
            tensors, optimizer = (load_file(path / name) for name in _FILES)
        else:
            tensors, optimizer = _joined_shards(path)
        trainer.restore(notes.pop("step"), tensors, optimizer, notes)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except NotesError as e:
        raise unlike(path, str(e)) from None
    except (KeyError, RuntimeError) as e:
        raise UserError(f"{path}: is not of this run's tensors: {e}") from None
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path}: cannot be read: {e}") from None


def _best_step(best: Path) -> int | None:
    """Of which step the best tensors are; None if they are not whole."""
    # a kill as one took another's place leaves neither so
    return None if problems(best) else int(read_state(best)["step"])


def _fill(path: Path, shards: Shards) -> None:
    """Overwrite shares with what any number of ranks wrote, layers joined or not.

    Raises:
        KeyError: It is of other tensors.
        RuntimeError: Of another shape.
    """
    there = stored(path)
    joined = joined_keys(there)
    known = {*there, *(part for parts in joined.values() for part in parts)}
    # of 16-bit tensors that one GPU trained, the fp32 copies
    masters = {
        n: f"{n}/master"
        for n in shards.tensors
        if f"{n}/master" in known or all(f"{part}/master" in known for part in parts_of(n))
    }
    wanted = {masters.get(n, n): t for n, t in shards.tensors.items()} | shards.statistics
    for key, parts in joined_keys(wanted).items():
        if key not in there:
            found = [_whole(path, there, part) for part in parts]
            # a count of steps is the same for all
            fill(wanted.pop(key), torch.cat(found) if found[0].ndim else found[0])
    for key, parts in joined.items():
        if parts[0] not in wanted:
            continue
        targets = [wanted.pop(part) for part in parts]
        rows = _whole(path, there, key)
        # a count of steps is the same for all
        counts = [len(t) for t in targets] if rows.ndim else []
        pieces = torch.split(rows, counts) if counts else [rows] * len(targets)
        for target, piece in zip(targets, pieces, strict=True):
            fill(target, piece)
    load_shards(path, wanted, shards.group)


def _whole(path: Path, there: Mapping[str, tuple[torch.Size, torch.dtype]], name: str) -> Tensor:
    size, dtype = there[name]
    tensor = torch.zeros(size, dtype=dtype)
    load_shards(path, {name: tensor})
    return tensor


def _joined_shards(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors and statistics that several ranks wrote, whole, on the CPU."""
    found = {name: torch.zeros(size, dtype=dtype) for name, (size, dtype) in stored(path).items()}
    load_shards(path, found)
    tensors = {name: t for name, t in found.items() if "/" not in name}
    return tensors, {name: t for name, t in found.items() if "/" in name}


def checkpoints(run: Path) -> list[Path]:
    """Those of a run, newest first, as they were named when they were whole; nothing of them is read.

    Raises:
        UserError: Their folder cannot be read.
    """
    folder = run / "checkpoints"
    try:
        found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name)] if folder.is_dir() else []
    except OSError as e:
        raise UserError(f"{folder}: cannot be read: {e.strerror or e}") from None
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
