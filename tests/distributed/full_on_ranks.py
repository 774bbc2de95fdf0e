"""Checks of full fine-tuning that several processes run together; see ``on_ranks.py``."""

import errno
import gc
import json
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from itertools import count, product
from pathlib import Path
from typing import Any
from weakref import ref

import as_one
import pytest
import torch
from subjects import (
    TOLERANCE,
    Tuner,
    close,
    config_of,
    examples,
    figures,
    same_tuning,
)
from torch import nn
from torch.distributed.checkpoint import hf_storage
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.tensor.debug import CommDebugMode

from tli_engine.cli import _train_sft
from tli_engine.cli._train_sft import SftJob
from tli_engine.distributed.fully_sharded import is_sharded, whole
from tli_engine.distributed.world import ALONE, World
from tli_engine.errors import StoppedElsewhere, UserError
from tli_engine.models import recompute
from tli_engine.models.arrangement import Arrangement
from tli_engine.models.causal import CausalModel
from tli_engine.testing import example_store
from tli_engine.train.checkpoint import load_checkpoint, save_checkpoint
from tli_engine.train.manifest import problems
from tli_engine.train.memory import out_of_memory
from tli_engine.train.sft_distribute import shard_weights
from tli_engine.train.sft_step import pack_of

FUSED: dict[str, Any] = {"engine": "fused", "learning_rate": 1e-3}


def check_sft_of_every_weight(world: World, folder: Path) -> None:
    full = {"method": "full", "train": {"max_grad_norm": 1.0, "learning_rate": 1e-3}}
    tuned = same_tuning(folder, world, **full)
    assert all(map(is_sharded, tuned.model.trainable().values()))
    same_tuning(folder, world, **full, sft={"activations": "save"}, distributed={"offload": True})


def check_full_fused(world: World, folder: Path) -> None:
    """What is shared out are the joined layers; the losses are those of one process."""
    full = {"method": "full", "train": {**FUSED, "max_grad_norm": 1.0}}
    tuned = same_tuning(folder, world, **full)
    trained = tuned.model.trainable()
    assert all(map(is_sharded, trained.values()))
    assert any("q_proj+k_proj+v_proj" in name for name in trained)
    assert not any(".q_proj." in name for name in trained)
    sizes = [
        sum(t.numel() for n, t in trained.items() if n.startswith(f"layers.{i}.")) for i in range(4)
    ]
    total = sum(t.numel() for t in trained.values())
    assert tuned.model.spread is not None
    # gradients and moments of a share; of the rest a gradient, and what passes of a block, in fp32
    share = 12 * -(-total // world.size)
    assert tuned.model.spread.to_come == share + 4 * (total - sum(sizes)) + 16 * max(sizes)
    assert tuned.said == ["blocks stay gathered until their way back: 0.0 GiB a GPU"]
    # several batches of a rank are added up
    accumulated = {"train": {**full["train"], "batch_size": 2, "accumulate": 4}}
    same_tuning(folder, world, **full | accumulated)
    same_tuning(folder, world, **full, distributed={"offload": True})


def check_full_fused_of_other_families(world: World, folder: Path) -> None:
    """With biases; with norms of heads and behind attention and MLP, and several kinds of angles."""
    for family in ("qwen2", "gemma3_text"):
        same_tuning(folder / "families" / family, world, method="full", train=FUSED)


def check_full_norm_is_one_sum(world: World, folder: Path) -> None:
    """Of the gradients of all tensors, which are then as long as they may be."""
    tuner = Tuner(
        folder, config_of("sft", method="full", train={**FUSED, "max_grad_norm": 0.1}), world
    )
    torch.autograd.backward(tuner.model.loss(pack_of(example_store(examples()), [[0]])))
    found = [t.grad for t in tuner.model.trainable().values()]
    assert len(found) > 20
    whole_norm = torch.linalg.vector_norm(torch.cat([whole(g).flatten() for g in found]))
    with CommDebugMode() as mode:
        norm = tuner.trainer.engine.updates.clip()
    assert mode.get_total_counts() == 1
    torch.testing.assert_close(norm, whole_norm, rtol=TOLERANCE, atol=0)
    clipped = torch.cat([whole(g).flatten() for g in found])
    torch.testing.assert_close(
        torch.linalg.vector_norm(clipped), torch.tensor(0.1), rtol=1e-4, atol=0
    )


def check_full_out_of_memory(world: World, folder: Path) -> None:
    """What is said to change is what several GPUs can change."""
    tuner = Tuner(folder, config_of("sft", method="full", train=FUSED), world)
    line = out_of_memory(tuner.model, tuner.trainer.engine.updates, RuntimeError("no room"))
    assert line.endswith("or distributed.offload=true")
    assert "adamw-8bit" not in line


def check_full_blocks_that_do_not_stay(world: World, folder: Path) -> None:
    """Gathered again for the way back, run again or not, on the ops and in modules."""
    for engine, activations in product(("modules", "fused"), ("save", "recompute")):
        config = config_of(
            "sft",
            method="full",
            train={**FUSED, "engine": engine},
            sft={"activations": activations},
        )
        one, several = Tuner(folder, config).run(), Tuner(folder, config, world)
        assert several.model.spread is not None
        several.model.spread.decide(0)
        assert not several.model.spread.undecided
        several.run()
        close(figures(several.steps), figures(one.steps))
        assert several.said[0].startswith("blocks are gathered again for the way back: ")


def check_full_halves_of_blocks_run_again(world: World, folder: Path) -> None:
    config = config_of("sft", method="full", train=FUSED)
    expected = Tuner(folder, config).run()
    for part in (0, 1):
        tuner = Tuner(folder, config, world)
        tuner.model.activations.arrangement = Arrangement(3, 1, part)
        close(figures(tuner.run().steps), figures(expected.steps))


def check_full_nothing_stays_gathered(world: World, folder: Path) -> None:
    """Blocks and the rest stay whole until the way back, and where there is none they do not."""
    for engine in ("modules", "fused"):
        config = config_of("sft", method="full", train={**FUSED, "engine": engine})
        tuner = Tuner(folder, config, world)
        model, shares = tuner.model, list(tuner.trainer.engine.tensors)

        def sharded(model: CausalModel = model) -> list[str]:
            return [name for name, t in model.trainable().items() if is_sharded(t)]

        tuner.trainer.validate()
        assert sharded() == shares
        for stay, until in ((None, 0), (0, 3)):
            if model.spread is not None and stay is not None:
                model.spread.decide(stay)
            loss = model.loss(pack_of(example_store(examples()), [[0]]))
            # the last one is the first to go back
            below = tuple(f"layers.{i}." for i in range(until))
            assert sharded() == [name for name in shares if name.startswith(below)]
            torch.autograd.backward(loss)
            assert sharded() == shares
            tuner.trainer.validate()
            assert sharded() == shares


def check_full_all_decide_as_the_fullest(world: World, folder: Path) -> None:
    """Of what each measures; the losses stay what they are, whatever is kept and stays."""
    for engine in ("modules", "fused"):
        config = config_of("sft", method="full", train={**FUSED, "engine": engine})
        expected = Tuner(folder, config).run()
        found = []
        loss = Tuner(folder, config).model.reserve().loss
        for free in (loss + 1e9, loss + 9e6, 0.0):
            tuner = Tuner(folder, config, world)
            with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
                taken = count(step=1_000_000 + world.rank)
                patch.setattr(recompute, "_counts", lambda device: True)
                patch.setattr(recompute, "_allocated", lambda device, t=taken: next(t))
                # the first one has a little more, the last one that and no more
                left = free if world.rank else loss + 2e9
                patch.setattr(recompute, "_free", lambda device, left=left: int(left))
                # of views, whose hooks might be lost
                warnings.simplefilter("error")
                tuner.run()
            close(figures(tuner.steps), figures(expected.steps))
            assert tuner.model.spread is not None
            arrangement = tuner.model.activations.arrangement
            found.append((arrangement, tuner.said))
            assert len(set(world.gather(repr(found)))) == 1
        assert [said[0].split()[1] for _, said in found] == ["stay", "stay", "are"]
        parts = 2 if engine == "fused" else 1
        kept = [sum(sum(a.keeps(i, parts)) for i in range(4)) for a, _ in found if a is not None]
        assert kept[0] == 4 * parts > kept[1] > kept[2] == 0


def check_full_frees_what_was_before(world: World, folder: Path) -> None:
    """Once the shares are there, nothing of a run holds a whole weight."""
    data = folder / "shards" / f"articles-{world.rank}.jsonl"
    data.write_text(json.dumps({"text": "habari", "summary": "x"}) + "\n")
    for engine in ("modules", "fused"):
        config = config_of(
            "sft",
            method="full",
            data=str(data),
            sft={"context": 64},
            train={**FUSED, "engine": engine},
        )
        config = config.model_copy(update={"model": str(folder)})
        job = SftJob.prepare(config, world)
        fused = job.run.model.early.fused
        # each is joined where it goes
        assert (fused is None) is (engine == "modules")
        assert fused is None or not fused.blocks
        before = [ref(t) for t in (*job.run.tensors.values(), *job.run.model.weights().values())]

        def share_out(*arguments: Any, job: SftJob = job) -> dict[str, nn.Parameter]:
            # or it would stay until all blocks are shared out
            assert not job.run.tensors
            return shard_weights(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_train_sft, "shard_weights", share_out)
            trainer = job.make_trainer(folder, lambda line: None)
        gc.collect()
        assert fused is None or len(fused.blocks) == 4
        assert not any(r() is not None for r in before)
        assert list(job.run.tensors) == list(trainer.engine.tensors)
        # as many as the whole model has
        assert str(sum(w.numel() for w in Tuner(folder, config).model.trainable().values())) in (
            job.introduction().replace(",", "")
        )


def check_sft_of_every_weight_in_bf16(world: World, folder: Path) -> None:
    """The shares, which are the master copy, and what they are summed in, are fp32."""
    for engine in ("modules", "fused"):
        same_in_bf16(world, folder, engine)


def check_sft_in_bf16_is_that_of_one(world: World, folder: Path) -> None:
    """As on GPUs; a rank is without a row in one step."""
    inputs = folder / "shards" / f"as-one-of-{world.size}"
    world.together(lambda: as_one.write_inputs(inputs) if world.is_first else None)
    for case in ("sharded-nf4", "full-offloaded", "full-fused"):
        alone = as_one.train(case, inputs, "cpu")
        as_one.compare(as_one.train(case, inputs, "cpu", world), alone)


def same_in_bf16(world: World, folder: Path, engine: str) -> None:
    train = {"learning_rate": 1e-3, "engine": engine}
    config = config_of("sft", method="full", dtype="bfloat16", train=train)
    tuned = Tuner(folder, config, world).run()
    plain = Tuner(folder, config.model_copy(update={"dtype": "float32"}), world).run()
    for tensor in tuned.model.trainable().values():
        assert tensor.dtype == torch.float32
    losses = [[step.loss for step in t.steps] for t in (tuned, plain)]
    assert losses[0] != losses[1]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=0.02, atol=0)
    rounded = [t.to(torch.bfloat16).float() for t in map(whole, tuned.model.trainable().values())]
    fine = list(map(whole, tuned.model.trainable().values()))
    assert not all(torch.equal(r, f) for r, f in zip(rounded, fine, strict=True))


def check_shards_resume_on_one_and_the_other_way(world: World, folder: Path) -> None:
    """A checkpoint of several ranks on one, and of one on several: the rest is as if never stopped."""
    config = config_of("sft", method="full", train={"learning_rate": 1e-3})
    expected = Tuner(folder, config).run()
    for writes, reads, name in ((world, ALONE, "several"), (ALONE, world, "one")):
        run = folder / "shards" / f"{name}-{world.size}"
        first = Tuner(folder, config, writes)
        first.trainer.run(until=lambda trainer=first.trainer: trainer.reported == 2)
        # alone, every rank has the same: the first writes
        path = save_checkpoint(run, first.trainer, 2, world)
        assert world.share(problems(path)) == []
        assert not any(p.suffix in (".pt", ".distcp") for p in path.iterdir())
        second = Tuner(folder, config, reads)
        with warnings.catch_warnings():
            # that there is one process
            warnings.simplefilter("error", UserWarning)
            load_checkpoint(path, second.trainer)
        assert second.trainer.step == 2
        second.run()
        close(figures(second.steps), figures(expected.steps[2:]))


def check_shards_resume_where_layers_are_joined(world: World, folder: Path) -> None:
    """As on one GPU, whose fused blocks have one weight where several GPUs have q, k and v."""
    changes: dict[str, Any] = {"method": "full", "train": {"learning_rate": 1e-3}}
    config = config_of("sft", **changes)
    first = Tuner(folder, config, world)
    first.trainer.run(until=lambda: first.trainer.reported == 2)
    path = save_checkpoint(folder / "shards" / f"joined-{world.size}", first.trainer, 2, world)
    fused = config_of("sft", **changes | {"train": changes["train"] | {"engine": "fused"}})
    expected, second = Tuner(folder, config).run(), Tuner(folder, fused)
    assert any("q_proj+k_proj" in name for name in second.model.trainable())
    load_checkpoint(path, second.trainer)
    second.run()
    close(figures(second.steps), figures(expected.steps[2:]))
    # and the other way
    alone = Tuner(folder, fused)
    alone.trainer.run(until=lambda: alone.trainer.reported == 2)
    path = save_checkpoint(folder / "shards" / f"alone-{world.size}", alone.trainer, 2, world)
    assert world.share(problems(path)) == []
    several = Tuner(folder, config, world)
    load_checkpoint(path, several.trainer)
    several.run()
    close(figures(several.steps), figures(expected.steps[2:]))


def check_shards_of_joined_layers(world: World, folder: Path) -> None:
    """Several ranks on the ops: 2 to 1 to 2, and what modules wrote, one process or several."""
    config = config_of("sft", method="full", train=FUSED)
    modules = config_of("sft", method="full", train={**FUSED, "engine": "modules"})
    expected = Tuner(folder, config).run()
    for name, writers in (
        ("there-and-back", [(config, world), (config, ALONE)]),
        ("of-modules", [(modules, world)]),
        ("of-modules-of-one", [(modules, ALONE)]),
    ):
        run, path = folder / "shards" / f"{name}-{world.size}", None
        for step, (written_by, ranks) in enumerate(writers, 1):
            tuner = Tuner(folder, written_by, ranks)
            if path is not None:
                load_checkpoint(path, tuner.trainer)
            tuner.trainer.run(until=lambda tuner=tuner, step=step: tuner.trainer.reported == step)
            path = save_checkpoint(run, tuner.trainer, 2, world)
            assert world.share(problems(path)) == []
        assert path is not None
        last = Tuner(folder, config, world)
        load_checkpoint(path, last.trainer)
        close(figures(last.run().steps), figures(expected.steps[len(writers) :]))


def check_shards_that_one_cannot_write_or_read(world: World, folder: Path) -> None:
    """All end, by one line, and nothing is left of what could not be written."""
    run = folder / "shards" / f"full-disk-{world.size}"
    tuner = Tuner(folder, config_of("sft", method="full"), world)
    tuner.trainer.run(until=lambda: tuner.trainer.reported == 1)

    def fails(*_: Any) -> None:
        raise OSError(errno.EIO if path else errno.ENOSPC, "no disk")

    kind, path = (UserError if world.is_first else StoppedElsewhere), None
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 1:
            patch.setattr(hf_storage.HuggingFaceStorageWriter, "write_data", fails)
        with pytest.raises(kind) as error:
            save_checkpoint(run, tuner.trainer, 2, world)
    assert not world.is_first or "cannot be written: rank 1: " in str(error.value)
    # the first one's look, which it is that cleans up
    assert world.share([p.name for p in (run / "checkpoints").iterdir()]) == []
    path = save_checkpoint(run, tuner.trainer, 2, world)
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 1:
            patch.setattr(hf_storage.HuggingFaceStorageReader, "read_data", fails)
        with pytest.raises(kind) as error:
            world.together(lambda: load_checkpoint(path, tuner.trainer))
    assert not world.is_first or f"{path}: cannot be read: rank 1: " in str(error.value)


def check_shards_may_take_longer_than_the_timeout(world: World, folder: Path) -> None:
    """Of steps: the disk of one rank is slow."""
    run = folder / "shards" / f"slow-{world.size}"
    tuner = Tuner(folder, config_of("sft", method="full"), world)
    tuner.trainer.run(until=lambda: tuner.trainer.reported == 1)
    world.sum([0.0])
    _set_pg_timeout(timedelta(seconds=0.3))
    with pytest.MonkeyPatch.context() as patch:
        for of, name in (
            (hf_storage.HuggingFaceStorageWriter, "write_data"),
            (hf_storage.HuggingFaceStorageReader, "read_data"),
        ):
            work = getattr(of, name)

            def slow(*arguments: Any, work: Callable[..., Any] = work) -> Any:
                time.sleep(0.8 * (world.rank == 1))
                return work(*arguments)

            patch.setattr(of, name, slow)
        path = save_checkpoint(run, tuner.trainer, 2, world)
        world.together(lambda: load_checkpoint(path, tuner.trainer))
    _set_pg_timeout(timedelta(seconds=60))
    assert world.share(problems(path)) == []


def check_write_shards(world: World, folder: Path) -> None:
    """For other numbers of ranks to read: see test_on_ranks.py."""
    config = config_of("sft", method="full", train={"learning_rate": 1e-3})
    tuner = Tuner(folder, config, world)
    tuner.trainer.run(until=lambda: tuner.trainer.reported == 2)
    save_checkpoint(folder / "shards" / "written", tuner.trainer, 2, world)


def check_read_shards(world: World, folder: Path) -> None:
    config = config_of("sft", method="full", train={"learning_rate": 1e-3})
    expected, tuner = Tuner(folder, config).run(), Tuner(folder, config, world)
    load_checkpoint(folder / "shards" / "written" / "checkpoints" / "step-000002", tuner.trainer)
    tuner.run()
    close(figures(tuner.steps), figures(expected.steps[2:]))
