"""A plan for several GPUs: the shares are counted, and they are those that ranks hold."""

from collections.abc import Callable
from typing import Any

import pytest

from bench.models import config_of
from tli_engine.config import RunConfig, resolve_config
from tli_engine.errors import UserError
from tli_engine.models.survey import Survey
from tli_engine.train import plan_gpus
from tli_engine.train.plan import Plan, limited, make_plan
from tli_engine.train.plan_devices import GIB, find_target
from tli_engine.train.plan_gpus import FullBytes, full_bytes, gpus_needed, plan_for, rank_config
from tli_engine.train.plan_outline import Outline

Planned = Callable[..., Plan]


def run_of(name: str, **sections: Any) -> RunConfig:
    values: dict[str, Any] = {
        "model": name,
        "objective": "sft",
        "data": {"texts": "none.jsonl"},
        "sft": {"context": 2048},
        "train": {"steps": 9, "batch_size": 4, "accumulate": 4},
    }
    return resolve_config(values | sections, "test")


def survey_of(name: str) -> Survey:
    return Survey(name, config_of(name), None)


def planned(name: str, gpus: int, kind: str = "h100", **sections: Any) -> Plan:
    target = find_target(kind, "auto")
    return plan_for(run_of(name, **sections), survey_of(name), target, gpus)


QLORA = {"quantize": "nf4", "double_quant": True, "lora": {"layers": "0-2", "r": 16}}


def test_a_rank_has_its_share_of_the_rows() -> None:
    """No more rows at once than before, and fewer batches of them."""
    run = run_of("llama-3-8b")
    shares = {n: rank_config(run, n).train for n in (1, 2, 3, 8, 16, 32)}
    found = {n: (t.batch_size, t.accumulate) for n, t in shares.items()}
    assert found == {1: (4, 4), 2: (4, 2), 3: (4, 2), 8: (2, 1), 16: (1, 1), 32: (1, 1)}


def test_gpus_without_a_row_are_noted() -> None:
    said = "too few rows for 17 processes: a step has 16, which leaves 1 of them idle; make train.batch_size "
    for changes in (QLORA, {"method": "full"}):
        assert any(note.startswith(said) for note in planned("qwen2-1.5b", 17, **changes).notes)
        assert not any("idle" in note for note in planned("qwen2-1.5b", 16, **changes).notes)


def test_replicated_adapters_take_their_gradients_more() -> None:
    one, two = planned("llama-3-8b", 1, **QLORA), planned("llama-3-8b", 2, **QLORA)
    assert two.gpus == 2
    assert two.gpu_bytes.pop("gradients_of_all") == one.gpu_bytes["adapters"]
    assert two.gpu_bytes == one.gpu_bytes
    assert two.host_bytes["process"] == 2 * one.host_bytes["process"]


def test_sharded_bytes_are_a_share_and_two_blocks() -> None:
    whole = planned("qwen2-72b", 2, **QLORA)
    shared = planned("qwen2-72b", 2, **QLORA, distributed={"weights": "sharded"})
    nf4 = whole.gpu_bytes["weights_nf4"]
    assert nf4 > 36 * GIB
    assert shared.gpu_bytes["weights_nf4"] == nf4 // 2
    # its 80 blocks are alike
    assert shared.gpu_bytes["gathered_blocks"] == nf4 // 40
    assert any(note.startswith("fits: ") and "on each h100" in note for note in shared.notes)


def test_full_fine_tuning_of_8b_fits_two_h100_offloaded_and_four_without() -> None:
    full = {"method": "full", "train": {"steps": 9, "batch_size": 1}}
    parameters = 8_030_261_248
    rest = 2 * 128256 * 4096 + 4096
    for gpus in (2, 4):
        parts = planned("llama-3-8b", gpus, **full).gpu_bytes
        assert parts["weights"] == 4 * parameters // gpus
        assert parts["optimizer"] == 8 * parameters // gpus
        if gpus == 2:
            # the fullest is the end, when all gradients are there, those of the rest being summed
            assert parts["gradients"] == 4 * parameters // gpus
            assert parts["activations_and_working"] == (2 + 4) * rest
        else:
            # or the way back's begin: embeddings, output layer and the last norm are whole, in bf16
            assert parts["gradients"] == 0
            assert parts["gathered_embeddings"] == 2 * rest
    adding = full | {"train": {"steps": 9, "batch_size": 1, "accumulate": 8}}
    assert planned("llama-3-8b", 4, **adding).gpu_bytes["gradients"] == parameters
    offloaded = planned("llama-3-8b", 2, **full, distributed={"offload": True})
    assert not {"weights", "gradients", "optimizer"} & offloaded.gpu_bytes.keys()
    held = sum(v for k, v in offloaded.host_bytes.items() if k.endswith("_of_a_share"))
    assert held == 16 * parameters
    # there is room for whole blocks
    blocks, largest = parameters - 2 * 128256 * 4096 - 4096, 218_112_000
    assert "blocks stay gathered until their way back" in offloaded.notes
    assert offloaded.gpu_bytes["gathered_blocks"] == 2 * blocks + 6 * largest
    run = run_of("llama-3-8b", **full, distributed={"offload": True})
    small = plan_for(run, survey_of("llama-3-8b"), limited(find_target("h100", "auto"), 20), 2)
    assert small.gpu_bytes["gathered_blocks"] == (2 * 2 + 6) * largest
    assert "blocks are gathered twice" in small.notes
    assert small.recomputed > 0
    assert sum(small.gpu_bytes.values()) < 20 * GIB


@pytest.mark.parametrize(
    ("name", "kind", "rows"),
    [("qwen2-1.5b", "h100", 16), ("llama-3-8b", "h100", 1), ("llama-3-8b", "h200", 8)],
)
def test_nothing_is_kept_that_does_not_fit(name: str, kind: str, rows: int) -> None:
    """What is decided leaves room for all that the plan counts."""
    for gpus, offload in ((2, False), (8, False), (2, True)):
        train = {"steps": 9, "batch_size": rows, "accumulate": gpus}
        options = {"method": "full", "train": train, "distributed": {"offload": offload}}
        plan = planned(name, gpus, kind, **options)
        stays = "blocks stay gathered until their way back" in plan.notes
        assert stays is not ("blocks are gathered twice" in plan.notes)
        some = any("of them in part" in note for note in plan.notes)
        depth = {"qwen2-1.5b": 28, "llama-3-8b": 32}[name]
        if stays or some or plan.recomputed < depth:
            assert any(note.startswith("fits: ") for note in plan.notes)
        assert not any(note.startswith("steps are replayed") for note in plan.notes)


@pytest.mark.parametrize(
    ("name", "method", "rows", "times", "replayed"),
    [
        # 3.8e11 and 7.7e11 of a block's weights times a rank's tokens, of 4e11
        ("qwen2-1.5b", "full", 8, 1, True),
        ("qwen2-1.5b", "full", 8, 2, False),
        ("qwen2-1.5b", "full", 16, 1, False),
        # 8.9e11 and 1.8e12, of 9e11
        ("llama-3-8b", "lora", 4, 1, True),
        ("llama-3-8b", "lora", 4, 2, False),
    ],
)
def test_graphs_are_planned_by_what_a_rank_takes_at_once(
    name: str, method: str, rows: int, times: int, replayed: bool
) -> None:
    train = {"steps": 9, "batch_size": rows, "accumulate": times}
    plan = planned(name, 2, "h200", method=method, train=train)
    assert any(note.startswith("steps are replayed") for note in plan.notes) == replayed
    if method == "full":
        # those of one pack are there with the next one, or stay for the graph
        assert (plan.gpu_bytes["gradients"] > 0) == replayed


def test_gpus_are_counted_by_the_rule_of_several() -> None:
    """Of a block's weights times tokens between that of several and that of one."""
    full = {"method": "full", "train": {"steps": 9, "batch_size": 1}}
    found = []
    for setting in ("auto", False, True):
        run = run_of("llama-3-8b", **full | {"train": full["train"] | {"cuda_graph": setting}})
        with pytest.MonkeyPatch.context() as patch:
            bytes_of: list[int] = []

            def watch(made: Outline, gpus: int, offload: bool, into: Any = bytes_of) -> FullBytes:
                counted = full_bytes(made, gpus, offload)
                into.append(sum(counted.on_gpu.values()))
                return counted

            patch.setattr(plan_gpus, "full_bytes", watch)
            patch.setattr(plan_gpus, "LARGE", ("h200",))
            dict(gpus_needed(run, survey_of("llama-3-8b")))
        found.append(bytes_of)
    assert found[0] == found[1] != found[2]


def test_what_is_kept_of_full_fine_tuning_is_as_on_one_gpu() -> None:
    """The engine's blocks; what is run again is chosen by what several GPUs have left."""
    full = {"method": "full", "train": {"steps": 9, "batch_size": 4, "accumulate": 2}}
    plan = planned("qwen2-1.5b", 2, "h200", **full)
    assert "the engine's blocks" in plan.notes[0]
    assert plan.recomputed == 0
    assert not any("run again" in note for note in plan.notes)
    tight = planned("llama-3-8b", 2, "h100", **full)
    assert tight.recomputed == 32
    assert any("32 of 32 blocks are run again" in note for note in tight.notes)
    asked = planned(
        "qwen2-1.5b", 2, "h200", **full, sft={"context": 2048, "activations": "recompute"}
    )
    assert asked.recomputed == 28
    modules = full | {"train": full["train"] | {"engine": "modules"}}
    assert "transformers' blocks" in planned("qwen2-1.5b", 2, "h200", **modules).notes[0]


def test_it_says_how_many_gpus_72b_takes() -> None:
    """The shares alone are 16 bytes of each of 72.7 billion weights."""
    model = survey_of("qwen2-72b")
    counts = dict(gpus_needed(run_of("qwen2-72b", method="full"), model))
    assert counts.keys() == {"a100", "h100", "h200", "b200"}
    total = 16 * 72_706_203_648
    for kind, count in counts.items():
        memory = find_target(kind, "auto").memory
        assert memory is not None
        room = 0.95 * memory
        # beside the shares: gathered weights, activations and CUDA's context, 5 to 30 GiB
        assert total / (room - 5 * GIB) <= count <= total / (room - 30 * GIB) + 1
    plan = planned("qwen2-72b", 8, method="full", train={"steps": 9, "batch_size": 8})
    assert any(n.startswith("does not fit: ") for n in plan.notes)
    (line,) = (note for note in plan.notes if "in shares over several GPUs" in note)
    assert f"{counts['h100']} x h100, {counts['h200']} x h200" in line
    enough = planned("qwen2-72b", counts["h200"], "h200", method="full",
                     train={"steps": 9, "batch_size": counts["h200"]})  # fmt: skip
    assert any(n.startswith("fits: ") for n in enough.notes)


def test_the_host_reads_the_model_in_each_process_and_writes_shares() -> None:
    parameters, largest = 8_030_261_248, 128256 * 4096
    read = 2 * parameters + 2 * largest
    full = {"method": "full", "train": {"steps": 9, "batch_size": 1}}
    for gpus, offload, copies in ((2, False, 2), (2, True, 1), (16, False, 2)):
        distributed = {"distributed": {"offload": offload}}
        host = planned("llama-3-8b", gpus, **full, **distributed).host_bytes
        # a share's weights and moments: as the GPU's copy, and as a file
        written = copies * 12 * parameters // gpus
        assert host["reading_or_checkpoint"] == min(gpus, 8) * max(read, written)
    # the last one's are small
    assert written < read


def test_one_gpu_is_planned_as_ever() -> None:
    run, model, target = run_of("llama-3-8b"), survey_of("llama-3-8b"), find_target("h100", "auto")
    assert plan_for(run, model, target, 1) == make_plan(run, model, target)


def test_what_several_gpus_refuse_the_plan_refuses() -> None:
    with pytest.raises(UserError, match="adamw-8bit"):
        planned("llama-3-8b", 2, method="full", train={"steps": 1, "optimizer": "adamw-8bit"})
    with pytest.raises(UserError, match="is of NF4 weights"):
        planned("llama-3-8b", 2, distributed={"weights": "sharded"}, quantize="none")
    with pytest.raises(UserError, match="there is one process"):
        planned("llama-3-8b", 1, distributed={"weights": "sharded"}, quantize="nf4")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_processes_on_cpus_are_planned_for_who_asks_for_them(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By --device or by the run's device; where merely no GPU is found they are not."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    model = survey_of("qwen2-1.5b")
    plans = {}
    for name, device in ((None, "cpu"), ("cpu", "cpu"), ("cpu", "auto"), ("cpu", "cuda")):
        run = run_of("qwen2-1.5b", method=method, device=device)
        plans[name, device] = plan_for(run, model, find_target(name, device), 2)
    (first, *same) = (plan.host_bytes for plan in plans.values())
    assert first["process"] > 0
    assert same == [first] * 3
    said = {device: plan.notes for (_, device), plan in plans.items()}
    line = "--gpus 2 trains on CPUs with device=cpu alone; the run has device="
    for device, notes in said.items():
        assert (line + device in notes) is (device != "cpu")
    found_none = find_target(None, "auto")
    run = run_of("qwen2-1.5b", method=method, device="auto")
    with pytest.raises(UserError, match="--gpus 2: no GPU is here; name a kind with plan --device"):
        plan_for(run, model, found_none, 2)


@pytest.mark.parametrize(("name", "said"), [("qwen2-1.5b", False), ("qwen2-72b", True)])
def test_how_many_gpus_is_said_where_one_does_not_do(name: str, said: bool) -> None:
    plan = planned(name, 1, "h200", method="full", train={"steps": 9, "batch_size": 1})
    assert any("in shares over several GPUs" in note for note in plan.notes) == said
