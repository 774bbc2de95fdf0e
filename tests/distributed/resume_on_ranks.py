"""Checks of ``on_ranks.py``: a run that one rank alone cannot go on with."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from subjects import Tuner, config_of

from tli_engine.cli import _train
from tli_engine.distributed.world import World
from tli_engine.errors import StoppedElsewhere, UserError
from tli_engine.train import manifest
from tli_engine.train.checkpoint import load_checkpoint, save_best, save_checkpoint
from tli_engine.train.manifest import write_manifest

# what state.json may say, and what is said of it
BROKEN = [
    ('{"step": ', "state.json: is not what training wrote: Expecting value: line 1 column 10 (char 9); move "),
    ("[]", "state.json: is not what training wrote: it has no step; "),
    ('{"best": {}}', "state.json: is not what training wrote: it has no step; "),
    ('{"step": 1, "best": {"loss": 1.0}}', "state.json: is not what training wrote: its best has no step"),
]  # fmt: skip
NO_NOTES = [
    ('{"step": 1}', "state.json: is not what training wrote: it has no best; move "),
    (
        '{"step": 1, "best": {}, "unmeasured": {}}',
        "state.json: is not what training wrote: it has no figures; move ",
    ),
    (
        '{"step": 1, "best": {}, "unmeasured": {"figures": {}}}',
        "state.json: is not what training wrote: ",
    ),
]


def ends(world: World, rank: int, said: str, work: Callable[[], Any]) -> None:
    """One rank says what is wrong, the others end with it, and all are together still."""
    with pytest.raises(UserError if world.rank == rank else StoppedElsewhere) as error:
        work()
    assert world.rank != rank or said in str(error.value), error.value
    assert world.sum([1.0]) == [world.size]


def saved(folder: Path, world: World, **changes: Any) -> tuple[Tuner, Path]:
    """A trainer after a step, and a checkpoint with a best beside it, a copy for each rank."""
    run = folder / "shards" / f"resumed-{'-'.join(changes.values())}-{world.size}"
    tuner = Tuner(folder, config_of("sft", **changes), world)
    tuner.trainer.run(until=lambda: tuner.trainer.reported == 1)
    save_best(run, tuner.trainer, world)
    path = save_checkpoint(run, tuner.trainer, 2, world)
    world.together(lambda: None)
    own = run / f"of-{world.rank}"
    shutil.copytree(path, own / "checkpoints" / path.name)
    shutil.copytree(run / "best", own / "best")
    return tuner, own / "checkpoints" / path.name


def check_resume_from_a_state_that_one_cannot_read(world: World, folder: Path) -> None:
    for changes in ({}, {"method": "full"}):
        tuner, path = saved(folder, world, **changes)
        state, last = path / "state.json", world.size - 1
        whole, load = state.read_text(), lambda: load_checkpoint(path, tuner.trainer, world)  # noqa: B023
        for text, said in BROKEN:
            if world.rank == last:
                state.write_text(text)
            ends(world, last, said, load)
        if world.rank == last:
            state.unlink()
        ends(world, last, "is not what training wrote: No such file or directory", load)
        if world.rank == last:
            state.write_text(json.dumps(json.loads(whole) | {"step": 7}))
        said = f"what is there on rank {last} is not that of rank 0; all machines must see the same"
        ends(world, 0, said, load)
        # of all: the first one says it
        for text, said in BROKEN[:1] + NO_NOTES:
            state.write_text(text)
            ends(world, 0, said, load)
        state.write_text(whole)
        load()
        assert tuner.trainer.step == 1


def check_resume_with_a_best_that_the_first_cannot_read(world: World, folder: Path) -> None:
    tuner, path = saved(folder, world, method="lora")
    best = path.parents[1] / "best"
    if world.is_first:
        (best / "state.json").write_text('{"stop": 1}')
        write_manifest(best, ("adapter_model.safetensors", "state.json"))
    said = "best/state.json: is not what training wrote: it has no step; move "
    ends(world, 0, said, lambda: load_checkpoint(path, tuner.trainer, world))


def check_resume_from_shards_of_which_one_is_not_seen(world: World, folder: Path) -> None:
    tuner, path = saved(folder, world, method="full", dtype="float32")
    if world.rank == world.size - 1:
        next(path.glob("*.safetensors")).unlink()
    said = f"what is there on rank {world.size - 1} is not that of rank 0"
    ends(world, 0, said, lambda: load_checkpoint(path, tuner.trainer, world))


def check_resume_of_what_the_first_cannot_look_through(world: World, folder: Path) -> None:
    _, path = saved(folder, world, dtype="float32")

    def fails(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "sha256", fails)
        said = ".safetensors: cannot be read: Input/output error"
        ends(world, 0, said, lambda: _train._find(world, path.parents[1]))
