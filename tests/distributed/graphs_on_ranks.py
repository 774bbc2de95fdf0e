"""Checks of packs that graphs replay, which several processes run together; see ``on_ranks.py``."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from subjects import Tuner, close, config_of, examples, figures
from torch import Tensor

from tests.fake_graphs import FakeRecorder
from tli_engine.distributed.fully_sharded import own_part
from tli_engine.distributed.world import ALONE, World
from tli_engine.testing import example_store
from tli_engine.train import memory, pack_graphs
from tli_engine.train.filled import shape_of
from tli_engine.train.memory import out_of_memory
from tli_engine.train.pack_graphs import PackGraphs
from tli_engine.train.sft_order import batches_of_rank
from tli_engine.train.sft_step import pack_of

FUSED: dict[str, Any] = {"engine": "fused", "learning_rate": 1e-3, "steps": 5}
FULL: dict[str, Any] = {"method": "full", "train": FUSED | {"batch_size": 4, "accumulate": 1}}


def replaying(folder: Path, world: World, **changes: Any) -> tuple[Tuner, PackGraphs]:
    """A trainer whose packs are filled up and replayed."""
    tuner = Tuner(folder, config_of("sft", **changes), world)
    met = ALONE if tuner.model.spread is None else world
    graphs = PackGraphs(tuner.model, 32, lambda line: None, world=met)
    tuner.trainer.engine.use_graphs(graphs)
    if tuner.model.spread is not None:
        graphs._recorder.shares = [*tuner.trainer.engine.tensors.values()]  # type: ignore[union-attr]
    return tuner, graphs


@contextmanager
def recorder() -> Iterator[list[FakeRecorder]]:
    made: list[FakeRecorder] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            pack_graphs, "GraphRecorder", lambda of: made.append(FakeRecorder(of)) or made[-1]
        )
        yield made


def check_graphs_shape_is_everyones(world: World, folder: Path) -> None:
    """It holds the pack of each, and is a pack's own where all have the same."""
    store = example_store(examples())
    own = pack_of(store, [[world.rank], [3]] if world.rank else [[0]])
    mine, common = shape_of(own, 32, 0), shape_of(own, 32, 0, world)
    assert len(set(world.gather(repr(common)))) == 1
    for name in ("tokens", "documents", "labels", "longest"):
        assert getattr(common, name) >= getattr(mine, name)
    same = pack_of(store, [[0], [3]])
    assert shape_of(same, 32, 0, world) == shape_of(same, 32, 0)


def check_graphs_of_every_weight_are_all_ranks(world: World, folder: Path) -> None:
    """What is launched on one is launched on all, and so is what is replayed; losses stay what they are."""
    expected = Tuner(folder, config_of("sft", **FULL)).run()
    with recorder() as made:
        tuner, graphs = replaying(folder, world, **FULL)
        captured = []
        report = tuner.trainer.on_step
        tuner.trainer.on_step = lambda step: (report(step), captured.append(graphs.captured))
        tuner.run()
    close(figures(tuner.steps), figures(expected.steps))
    (used,) = made
    replays = [graph.replays for graph in used.graphs]
    assert sum(replays) > 0
    assert used.launched + sum(replays) == len(tuner.steps)
    assert len(set(world.gather(repr((used.launched, replays, captured))))) == 1
    # or NCCL would wait for them at the end
    assert captured[-1] > graphs.captured == 0


def check_graphs_add_to_gradients_that_are_summed(world: World, folder: Path) -> None:
    """In the buffer that is sent, where the first step's gradients come to lie; batches add up."""
    adding = {"train": FUSED | {"batch_size": 1, "accumulate": 2 * world.size}}
    expected = Tuner(folder, config_of("sft", **adding)).run()
    with recorder() as made:
        tuner, graphs = replaying(folder, world, **adding)
        engine, places, captured = tuner.trainer.engine, [], []
        for step in range(4):
            engine.run(step, ahead=False)
            grads = [tensor.grad for tensor in engine.tensors.values()]
            places.append([grad.data_ptr() for grad in grads if grad is not None])
            captured.append(graphs.captured)
    assert len(places[0]) == len(engine.tensors)
    assert all(place == places[0] for place in places)
    # the first step's packs, and a shape's first one, are launched
    assert captured[0] == 0 < captured[-1]
    assert sum(graph.replays for graph in made[0].graphs) > 0
    with recorder():
        again, _ = replaying(folder, world, **adding)
        close(figures(again.run().steps), figures(expected.steps))


def check_graphs_write_gradients_of_shares(world: World, folder: Path) -> None:
    """A step's first pack writes them, all in one place; its others add to them."""
    train = FUSED | {"batch_size": 1, "accumulate": 2 * world.size, "steps": 8}
    # a row for each text: of four ranks, too, each has two
    adding = {"method": "full", "sft": {"packing": False}, "train": train}
    expected = Tuner(folder, config_of("sft", **adding)).run()
    with recorder() as made:
        tuner, graphs = replaying(folder, world, **adding)
        engine = tuner.trainer.engine
        updates, tensors = engine.updates, engine.tensors.values()
        places, replays, clip = [], [], updates.clip

        def noting() -> Tensor:
            places.append([own_part(t.grad).data_ptr() for t in tensors if t.grad is not None])
            shapes = graphs._shapes.values()
            runs = [[s.writes for s in shapes], [s.adds for s in shapes]]
            replays.append([sum(r.graph.replays for r in kind if r.graph) for kind in runs])
            return clip()

        updates.clip = noting  # type: ignore[method-assign]
        tuner.run()
    close(figures(tuner.steps), figures(expected.steps))
    assert len(places) == len(tuner.steps)
    assert len(places[0]) == len(tensors)
    assert all(place == places[0] for place in places)
    # a shape's first pack of either kind is launched
    assert replays[0] == [0, 0]
    assert min(replays[-1]) > 0
    batches = map(engine._order.batches, range(len(tuner.steps)))
    packs = sum(len(batches_of_rank(of_step, 1, world)) for of_step in batches)
    assert made[0].launched + sum(replays[-1]) == packs
    assert all(tensor.grad is None for tensor in tensors)


def check_graphs_hold_memory_of_shares_between_steps(world: World, folder: Path) -> None:
    """That of gradients, which are given up: it is said where memory ends, and what to do."""
    tuner = Tuner(folder, config_of("sft", **FULL), world)
    engine = tuner.trainer.engine

    def line() -> str:
        return out_of_memory(tuner.model, engine.updates, RuntimeError("no room"))

    with pytest.MonkeyPatch.context() as patch:
        # of so small a model
        patch.setattr(memory, "GIB", 1)
        assert "gradients 0.0 GiB" in line()
        assert "cuda_graph" not in line()
        graphs = PackGraphs(tuner.model, 32, print, record=False, world=world)
        engine.use_graphs(graphs)
        engine.run(0, ahead=False)
        shares = sum(own_part(tensor).nbytes for tensor in engine.tensors.values())
        assert all(tensor.grad is None for tensor in engine.tensors.values())
        # the last ranks' shares of few rows are shorter: what is sent has the length of the others'
        assert shares <= int(re.search(r"gradients (\d+)", line())[1]) < 1.1 * shares
        assert "train.cuda_graph=false" in line()


def check_graphs_that_write_beside_the_others_end_the_run(world: World, folder: Path) -> None:
    """As they would if FSDP2 asked for the sums' memory elsewhere."""
    with recorder():
        tuner, graphs = replaying(folder, world, **FULL)
        engine = tuner.trainer.engine

        def record(run: Any) -> Any:
            for tensor in engine.tensors.values():
                tensor.grad = torch.zeros_like(tensor)
            return FakeRecorder(torch.device("cpu")).record(run)

        graphs._recorder.record = record  # type: ignore[method-assign,union-attr]
        with pytest.raises(RuntimeError, match="beside those of passes that were launched"):
            tuner.run()


def check_graphs_beside_pairs(world: World, folder: Path) -> None:
    """The pairs' way back is the last, and sends what packs added before."""
    config = config_of("joint", sft={"align_pairs": 5}, train=FUSED)
    expected = Tuner(folder, config).run()
    with recorder() as made:
        tuner = Tuner(folder, config, world)
        tuner.trainer.engine.use_graphs(PackGraphs(tuner.model, 32, lambda line: None))
        tuner.run()
    assert sum(graph.replays for graph in made[0].graphs) > 0
    close(figures(tuner.steps), figures(expected.steps))


def check_graphs_are_given_up_by_none_alone(world: World, folder: Path) -> None:
    """One process goes on with its graphs: nothing waits for them."""
    with recorder() as made:
        tuner, graphs = replaying(folder, ALONE, **FULL)
        tuner.run()
    assert graphs.captured == len(made[0].graphs) > 0
