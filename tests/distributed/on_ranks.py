"""Checks that several processes run together; each writes what came of them.

``python on_ranks.py GROUP,GROUP MODEL REPORTS``: those whose names begin with ``check_GROUP``, here, in
``gradients_on_ranks.py``, ``full_on_ranks.py``, ``graphs_on_ranks.py`` and ``resume_on_ranks.py``.
"""

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import full_on_ranks
import gradients_on_ranks
import graphs_on_ranks
import pytest
import resume_on_ranks
import torch
from subjects import TOLERANCE, Tuner, aligner, close, config_of, figures, same_tuning
from torch import Tensor

from tli_engine.cli import _train
from tli_engine.config import RunConfig
from tli_engine.distributed.launch import (
    _device_name,
    check_complete,
    check_same_gpus,
    joined,
)
from tli_engine.distributed.sharded_nf4 import ShardedNF4
from tli_engine.distributed.world import ALONE, World
from tli_engine.errors import StoppedElsewhere, TrainingError, UserError
from tli_engine.models.adapters import nf4_blocks
from tli_engine.train import checkpoint
from tli_engine.train.checkpoint import Found

PARTS = (gradients_on_ranks, full_on_ranks, graphs_on_ranks, resume_on_ranks)


def check_words_are_everyones(world: World, folder: Path) -> None:
    assert world.sum([1.0, world.rank]) == [world.size, sum(range(world.size))]
    assert world.largest([float(world.rank)]) == [world.size - 1]
    assert world.any(world.rank == world.size - 1)
    assert not world.any(False)
    texts = ["", "fupi", "ndefu — é", "x" * 100]
    assert world.gather(texts[world.rank]) == texts[: world.size]
    assert world.share({"rank": world.rank}) == {"rank": 0}


def check_words_an_error_of_one_ends_all(world: World, folder: Path) -> None:
    def work() -> str:
        if world.rank == 1:
            raise UserError("no such file here")
        return "done"

    expected = (UserError, "no such file") if world.rank == 1 else (StoppedElsewhere, "another")
    with pytest.raises(expected[0], match=expected[1]):
        world.together(work)
    assert world.together(lambda: "done") == "done"


def check_words_an_error_of_all_is_said_once(world: World, folder: Path) -> None:
    kind = TrainingError if world.is_first else StoppedElsewhere
    with pytest.raises(kind), world.speaking_once():
        raise TrainingError("loss nan")


def check_words_what_differs_is_named(world: World, folder: Path) -> None:
    kind = UserError if world.is_first else StoppedElsewhere
    with pytest.raises(kind) as error:
        world.check_alike("the data", "a" if world.rank < 1 else "b", "copy it")
    if world.is_first:
        assert str(error.value) == "the data on rank 1 is not that of rank 0; copy it"
    with pytest.raises(kind) as error:
        check_same_gpus(world, "H100 80 GiB" if world.rank else "A100 40 GiB")
    if world.is_first:
        assert "A100 40 GiB on rank 0, H100 80 GiB on rank 1; choose like ones" in str(error.value)
    check_same_gpus(world, "H100 80 GiB")
    with pytest.raises(kind) as error:
        check_same_gpus(world, "H100 80 GiB" if world.rank else _device_name("cpu"))
    if world.is_first:
        assert str(error.value) == (
            "not every process has a GPU: the CPU on rank 0, H100 80 GiB on rank 1; leave out the "
            "machines that have none, or set device=cpu on all"
        )
    with pytest.raises(UserError, match="9 processes were started"):
        check_complete(world, 9)


def same_alignment(folder: Path, world: World, **changes: Any) -> None:
    config = config_of("align", **changes)
    (one, expected), (several, found) = (aligner(folder, config, w) for w in (ALONE, world))
    one.run()
    several.run()
    close(figures(found), figures(expected))
    for name, tensor in one.state()[0].items():
        torch.testing.assert_close(several.state()[0][name], tensor, rtol=1e-4, atol=TOLERANCE)


def check_align_of_modules(world: World, folder: Path) -> None:
    same_alignment(folder, world, train={"engine": "modules", "max_grad_norm": 1.0})


def check_align_fused(world: World, folder: Path) -> None:
    same_alignment(folder, world, train={"engine": "fused"})


def check_align_fused_in_parts_and_whitened(world: World, folder: Path) -> None:
    same_alignment(
        folder, world, train={"engine": "fused", "chunk_tokens": 12}, align={"space": "whitened"}
    )


def check_align_of_less_pairs_than_ranks(world: World, folder: Path) -> None:
    same_alignment(folder, world, train={"batch_size": 2})
    same_alignment(folder, world, train={"batch_size": 2, "engine": "fused"})


def check_sft_of_adapters(world: World, folder: Path) -> None:
    """Three rows a step: ranks have shares of unlike size, some of them none."""
    same_tuning(folder, world, train={"max_grad_norm": 0.5})
    same_tuning(folder, world, train={"engine": "fused", "batch_size": 4, "accumulate": 1})


def check_sft_joint(world: World, folder: Path) -> None:
    same_tuning(folder, world, objective="joint", sft={"align_pairs": 5})


SHARDED = {"quantize": "nf4", "distributed": {"weights": "sharded"}}


def check_nf4_of_gathered_bytes(world: World, folder: Path) -> None:
    """Every block's, in both directions; statistics in 8 bits too."""
    for double in (False, True):
        config = config_of("sft", double_quant=double, **SHARDED)
        own = Tuner(folder, config)
        stored = [
            [t.clone() for layer in block for t in layer.stored_tensors()]
            for block in nf4_blocks(own.model.early)
        ]
        weights = [[layer.weight for layer in b] for b in nf4_blocks(own.model.early)]
        blocks = nf4_blocks(own.model.early)
        shards = ShardedNF4(blocks, world)
        for number in (0, 1, 2, 3, 3, 2, 1, 0, 2):
            shards.fetch(number)
            found = [t for layer in blocks[number] for t in layer.stored_tensors()]
            assert all(map(torch.equal, found, stored[number]))
            for layer, weight in zip(blocks[number], weights[number], strict=True):
                assert torch.equal(layer.weight.dequantize(), weight.dequantize())
        total = sum(t.nbytes for of_block in stored for t in of_block)
        largest = max(sum(t.nbytes for t in of_block) for of_block in stored)
        # what filling up takes is 256 bytes a tensor at the most
        room = 256 * (sum(map(len, stored)) + world.size)
        assert shards.nbytes <= total / world.size + 2 * largest + 3 * room
        assert shards.unchanged()
        shards._shards[1][0] ^= 1
        assert not shards.unchanged()


def check_nf4_sharded_trains_as_whole(world: World, folder: Path) -> None:
    for engine in ("modules", "fused"):
        tuned = same_tuning(folder, world, train={"engine": engine}, **SHARDED)
        assert tuned.shards is not None
        assert tuned.shards.unchanged()


def check_ends_on_a_loss_that_is_not_finite(world: World, folder: Path) -> None:
    config = config_of("sft", train={"learning_rate": 1e30})
    tuner = Tuner(folder, config, world)
    kind = TrainingError if world.is_first else StoppedElsewhere
    with pytest.raises(kind):
        tuner.run()
    done = [len(tuner.steps)]
    assert world.largest(done) == [-n for n in world.largest([-float(done[0])])] == [1]


def check_ends_where_one_is_out_of_memory(world: World, folder: Path) -> None:
    """In a step that is launched when it is asked for, by all or with others ahead, or ahead of time."""
    for ahead, step in ((False, 2), (True, 2), (True, 3)):
        tuner = Tuner(folder, config_of("sft"), world)
        tuner.trainer.run(until=lambda trainer=tuner.trainer: trainer.reported == 2)
        engine, loss = tuner.trainer.engine, tuner.model.loss
        engine.runs_ahead = ahead

        def fails(pack: Any, engine: Any = engine, loss: Any = loss, step: int = step) -> Tensor:
            if world.rank == 1 and engine._ready[0] == step:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB. GPU 1")
            return loss(pack)

        tuner.model.loss = fails  # type: ignore[method-assign]
        kind, text = (TrainingError, "out of memory") if world.rank == 1 else (StoppedElsewhere, "")
        with pytest.raises(kind, match=text):
            tuner.trainer.run()
        # they are together still
        assert world.sum([1.0]) == [world.size]
        assert tuner.trainer.step == 2


def check_ends_before_it_begins(world: World, folder: Path) -> None:
    """Where machines were to do different things, or the first one's files are not seen."""
    run, data = folder / "shards" / f"begins-{world.size}", folder / "shards" / "begins.jsonl"
    world.together(lambda: data.write_text(json.dumps({"text": "a", "summary": "x"}) + "\n"))
    config = config_of("sft", model=str(folder), data=str(data), sft={"context": 64})

    @contextmanager
    def here(*_: Any) -> Iterator[tuple[World, str]]:
        yield world, "cpu"

    def fresh(where: Path, config: RunConfig = config) -> int:
        return _train.run_training(config, "run", where, overwrite=False)

    def ends(work: Callable[[], int], said: str) -> None:
        with pytest.raises(UserError if world.is_first else StoppedElsewhere) as error:
            work()
        assert not world.is_first or said in str(error.value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_train, "joined", here)
        ends(
            lambda: fresh(run / str(world.rank)),
            "the run folder, or whether to resume, on rank 1 is not that of rank 0; give all machines "
            "the same folder",
        )
        last = world.rank == world.size - 1
        ends(
            lambda: _train.resume_training(config, run) if last else fresh(run),
            f"whether to resume, on rank {world.size - 1} is not that of rank 0",
        )
        shared = config.distributed.model_copy(update={"weights": "sharded"})
        sharded = config.model_copy(update={"distributed": shared})
        ends(lambda: fresh(run, sharded), "sharded is of NF4 weights, and the model's are not")
        assert not run.exists()
        # the file system of another machine
        patch.setattr(_train, "_begin", lambda *_: None)
        ends(lambda: fresh(run), "what the first process wrote there is not seen from ")
        looked: list[Path] = []
        found = Found(run / "checkpoints" / "step-000001", [])
        patch.setattr(_train, "find_checkpoint", lambda path: looked.append(path) or found)
        assert _train._find(world, run) == found
        assert looked == [run] * world.is_first


def check_ends_and_says_who_was_idle(world: World, folder: Path) -> None:
    """Of a row a step, a rank works."""
    run, data = folder / "shards" / f"idle-{world.size}", folder / "shards" / "idle.jsonl"
    world.together(lambda: data.write_text(2 * (json.dumps({"text": "a", "summary": "x"}) + "\n")))
    one = {"steps": 1, "batch_size": 1, "accumulate": 1}
    config = config_of(
        "sft", model=str(folder), data=str(data), sft={"context": 64, "packing": False}, train=one
    )
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_train, "joined", lambda *_: nullcontext((world, "cpu")))
        patch.setattr(_train, "warn", said.append)
        assert _train.run_training(config, "run", run, overwrite=False) == 0
    assert (
        f"too few rows for {world.size} processes: a step has 1, which leaves {world.size - 1} of them idle; "
        f"make train.batch_size times train.accumulate {world.size} or more, or start 1"
    ) in said


def check_shards_are_looked_at_by_one(world: World, folder: Path) -> None:
    """A checkpoint's files are read whole for their SHA-256 by no process but the first."""
    run = folder / "shards" / f"looked-at-{world.size}"
    tuner = Tuner(folder, config_of("sft", method="full"), world)
    tuner.trainer.run(until=lambda: tuner.trainer.reported == 1)
    looked: list[str] = []
    problems = checkpoint.problems
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "problems", lambda of: looked.append(of.name) or problems(of))
        assert checkpoint.load_best(run, tuner.trainer, world) is None
        checkpoint.save_best(run, tuner.trainer, world)
        path = checkpoint.save_checkpoint(run, tuner.trainer, 2, world)
        # it is there already
        checkpoint.save_checkpoint(run, tuner.trainer, 2, world)
        checkpoint.load_checkpoint(path, tuner.trainer, world)
        assert checkpoint.load_best(run, tuner.trainer, world) is not None
        assert path.name in _train._last_checkpoint(run, world)
        world.together(lambda: (run / "best" / "state.json").unlink() if world.is_first else None)
        with pytest.raises(UserError if world.is_first else StoppedElsewhere) as error:
            checkpoint.load_best(run, tuner.trainer, world)
    assert not world.is_first or "the best checkpoint is lost" in str(error.value)
    assert looked == [path.name, "best", "best", "best"] * world.is_first


def found_in(*parts: Any) -> dict[str, Any]:
    """What modules have, by name, after what this one has."""
    return dict(item for names in (globals(), *map(vars, parts)) for item in names.items())


def main() -> None:
    groups, folder, reports = sys.argv[1].split(","), *map(Path, sys.argv[2:4])
    torch.set_num_threads(1)
    checks: dict[str, Callable[[World, Path], None]] = {
        name: check
        for name, check in found_in(*PARTS).items()
        if name.startswith(tuple(f"check_{group}" for group in groups)) and callable(check)
    }
    found = {}
    with joined("cpu", timeout=60) as (world, _):
        for name, check in checks.items():
            try:
                check(world, folder)
                found[name] = ""
            except BaseException:
                found[name] = traceback.format_exc()
                # the others may not come to the report
                print(found[name], file=sys.stderr, flush=True)
            if world.any(bool(found[name])):
                # ranks may be apart from here on
                break
        (reports / f"{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
