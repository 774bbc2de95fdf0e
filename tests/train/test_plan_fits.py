"""What fits a GPU, and what of it is run again: models by their shapes, and peaks that were measured."""

from pathlib import Path
from typing import Any

import pytest

from bench.models import config_of
from bench.plan_goals import allocated_mib, planned_peaks
from tli_engine.config import read_recipe, resolve_config
from tli_engine.models.survey import Survey
from tli_engine.train.plan import Plan, limited, make_plan
from tli_engine.train.plan_devices import find_target
from tli_engine.train.plan_gpus import plan_for

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RESULTS = Path(__file__).parents[2] / "bench" / "results"


def llama(gib: float | None, **changes: Any) -> Plan:
    """Adapters on blocks 0-2 of Llama-3-8B's shape, 4 rows of 2,048 tokens, as the bench has it."""
    values: dict[str, Any] = {
        "model": "llama-3-8b",
        "objective": "sft",
        "quantize": "nf4",
        "double_quant": True,
        "data": {"texts": "none.jsonl"},
        "lora": {"layers": "0-2", "modules": ALL, "r": 16},
        "sft": {"context": 2048},
        "train": {"steps": 9, "batch_size": 4},
    }
    model = Survey("llama-3-8b", config_of("llama-3-8b"), None)
    target = limited(find_target("h100", "auto"), gib)
    return make_plan(resolve_config(values | changes, "test"), model, target)


def test_measured_peaks() -> None:
    """What torch had allocated at the most on an H200, and what the planner says today."""
    found = {}
    for row, plan in planned_peaks(RESULTS / "NVIDIA-H200"):
        graphs = any("replayed from CUDA graphs" in note for note in plan.notes)
        # what those hold is known less well
        assert allocated_mib(plan) == pytest.approx(row["peak_mib"], rel=0.03 if graphs else 0.001)
        assert any(note.startswith("fits: ") for note in plan.notes)
        found[row["model"], row["case"], row["provider"].partition(":")[2]] = (
            plan.recomputed,
            graphs,
        )
    assert found == {
        ("llama-3-8b", "lora_early", ""): (0, False),
        ("llama-3-8b", "lora_early", "12-gib-in-4"): (8, True),
        ("llama-3-8b", "lora_early", "bf16"): (0, False),
        ("llama-3-8b", "lora_all", ""): (0, False),
        ("llama-3-8b", "lora_all", "12-gib-in-4"): (24, True),
        ("llama-3-8b", "lora_all", "9-gib-in-4"): (31, True),
        ("llama-3-8b", "lora_all", "11-gib-in-4"): (29, True),
        ("llama-3-8b", "full", "in-backward"): (32, False),
        ("llama-3-8b", "full", "stochastic-in-backward"): (32, False),
        ("qwen2-1.5b", "lora_early", ""): (0, True),
        ("qwen2-1.5b", "lora_early", "recompute"): (28, True),
        ("qwen2-1.5b", "lora_early", "save"): (0, True),
        ("qwen2-1.5b", "full", ""): (0, True),
        ("qwen2-1.5b", "full", "recompute"): (28, True),
        ("qwen2-1.5b", "full", "stochastic"): (0, True),
        ("qwen2-72b", "lora_early", ""): (0, False),
        ("qwen2-72b", "lora_early", "79-gib"): (44, False),
    }


@pytest.mark.parametrize(
    ("recipe", "shape", "recomputed"),
    [
        pytest.param("xlsum-swahili", "llama-3-8b", 0, id="8b"),
        pytest.param("qwen2-72b-xlsum", "qwen2-72b", 44, id="72b"),
    ],
)
def test_recipes_of_summaries_fit_one_gpu(recipe: str, shape: str, recomputed: int) -> None:
    """Of models that are not here, their shapes."""
    run = resolve_config(read_recipe(recipe), recipe)
    model = Survey(run.model, config_of(shape), None)
    plan = make_plan(run, model, find_target("h100", "auto"))
    assert any(note.startswith("fits: ") for note in plan.notes)
    assert plan.recomputed == recomputed
    # as the recipe says
    full = {"method": "full", "quantize": "none", "double_quant": False}
    train = {"rounding": "stochastic", "in_backward": True, "accumulate": 1, "max_grad_norm": None}
    values = read_recipe(recipe)
    values |= full | {"train": values["train"] | train}
    notes = make_plan(resolve_config(values, recipe), model, find_target("h100", "auto")).notes
    assert any(note.startswith("fits: ") for note in notes) == (shape == "llama-3-8b")


@pytest.mark.parametrize("layers", ["0-2", "0,5"])
def test_adapters_updated_in_the_backward_pass_are_planned(layers: str) -> None:
    """Blocks between and above theirs have no gradients, and keep activations all the same."""
    run = {"lora": {"layers": layers, "modules": ALL, "r": 16}}
    at_once = {"steps": 9, "batch_size": 4, "in_backward": True}
    plan, whole = llama(None, **run, train=at_once), llama(None, **run)
    assert plan.gpu_bytes["activations"] == whole.gpu_bytes["activations"]
    assert plan.gpu_bytes.get("gradients", 0) <= whole.gpu_bytes.get("gradients", 0)


def test_modules_take_no_batch_in_parts() -> None:
    model = Survey("llama-3-8b", config_of("llama-3-8b"), None)
    values = {"model": "llama-3-8b", "lora": {"layers": "0-1"}, "quantize": "nf4"}
    peaks = {}
    for device in ("cpu", "h100"):
        for most in (None, 64):
            train = {"steps": 9, "batch_size": 400, "chunk_tokens": most}
            run = resolve_config(values | {"train": train, "device": "cpu"}, "test")
            plan = make_plan(run, model, find_target(device, "auto"))
            peaks[device, most] = sum((plan.gpu_bytes or plan.host_bytes).values())
            line = any("encode each batch whole" in note for note in plan.notes)
            assert line == (device == "cpu" and most is not None)
    assert peaks["cpu", 64] == peaks["cpu", None]
    assert peaks["h100", 64] < peaks["h100", None]


def test_dense_copies_of_auto_are_named() -> None:
    values = read_recipe("xlsum-swahili") | {"weight_residency": "auto"}
    run = resolve_config(values, "xlsum-swahili")
    model = Survey(run.model, config_of("llama-3-8b"), None)
    notes = make_plan(run, model, find_target("h100", "auto")).notes
    # 6.98 thousand million weights of blocks, of 2 bytes
    assert any("auto takes up to 13.0 GiB more" in note for note in notes)


def test_what_does_not_fit_says_so_and_less_memory_means_more_is_run_again() -> None:
    full = llama(None, method="full", quantize="none", double_quant=False)
    (line,) = (note for note in full.notes if note.startswith("does not fit: "))
    assert line.endswith("a smaller train.batch_size, a smaller sft.context or method: lora")
    # weights, master copies and two moments; gradients, all but the embeddings', which come last
    parameters, embeddings = 8_030_261_248, 128256 * 4096
    assert full.gpu_bytes["optimizer"] == pytest.approx(12 * parameters, rel=1e-3)
    assert full.gpu_bytes["gradients"] == pytest.approx(2 * (parameters - embeddings), rel=1e-5)
    peaks = [sum(llama(gib).gpu_bytes.values()) for gib in (None, 24, 12)]
    again = [llama(gib).recomputed for gib in (None, 24, 12)]
    assert peaks == sorted(peaks, reverse=True)
    assert again == sorted(again)


@pytest.mark.parametrize("gpus", [1, 2])
def test_a_share_is_the_allocators_alone(gpus: int) -> None:
    model = Survey("llama-3-8b", config_of("llama-3-8b"), None)
    run = resolve_config(
        {"model": "llama-3-8b", "lora": {"layers": "0-1"}, "quantize": "nf4"}, "test"
    )
    verdicts = {}
    for gib in (None, 8):
        plan = plan_for(run, model, limited(find_target("h100", "auto"), gib), gpus)
        (verdicts[gib],) = (note for note in plan.notes if note.startswith("fits: "))
        bytes_there = sum(plan.gpu_bytes.values()) - (0 if gib is None else 500 * 2**20)
        assert f"fits: {bytes_there / 2**30:.1f} GiB of " in verdicts[gib]
    assert "CUDA's context not counted" in verdicts[8]
    assert "CUDA's context" not in verdicts[None]
