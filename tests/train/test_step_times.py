"""Times that a plan gives are the committed ones of the benches, of runs that are alike."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.models import config_of
from tli_engine.config import resolve_config
from tli_engine.models.survey import Survey
from tli_engine.train.plan import limited, make_plan
from tli_engine.train.plan_devices import find_target
from tli_engine.train.step_times import MEASURED

RESULTS = Path(__file__).parents[2] / "bench" / "results"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EARLY = {
    "model": "llama-3-8b",
    "objective": "sft",
    "data": {"texts": "none.jsonl"},
    "quantize": "nf4",
    "double_quant": True,
    "lora": {"layers": "0-2", "modules": ALL},
    "sft": {"context": 2048},
    "train": {"steps": 9, "batch_size": 4},
}


def seconds(
    device: str, shape: str = "llama-3-8b", gib: float | None = None, **sections: Any
) -> float | None:
    """Of a step of LoRA on blocks 0-2 of a shape, changed by ``sections``."""
    values: dict[str, Any] = EARLY | {
        name: EARLY.get(name, {}) | change if isinstance(change, dict) else change
        for name, change in sections.items()
    }
    model = Survey(shape, config_of(shape), None)
    target = limited(find_target(device, "auto"), gib)
    return make_plan(resolve_config(values, "test"), model, target).step_seconds


def test_times_are_those_of_the_committed_results() -> None:
    """All of them, and no other."""
    numerics = {"tli-engine": "exact", "tli-engine:fast": "fast"}
    found = {}
    for device in {row.results for row in MEASURED}:
        for name in ("tli_step", "train_step"):
            path = RESULTS / device / f"{name}.json"
            for row in json.loads(path.read_text())["rows"]:
                # the whole recipe is no step
                if row["case"] == "training" or row["provider"] not in numerics:
                    continue
                shape = row["shape"]
                tokens = shape.get("tokens") or shape["rows"] * shape["length"]
                model, how = row["model"].split()[0], numerics[row["provider"]]
                found[device, model, row["case"], tokens, how] = row["ms"]
    known = {(m.results, m.model, m.case, m.tokens, m.numerics): m.ms for m in MEASURED}
    assert len(known) == len(MEASURED)
    assert known == pytest.approx(found, abs=0.006)
    assert {m.results for m in MEASURED} == {"NVIDIA-H100-80GB-HBM3", "NVIDIA-H200"}


def test_a_run_like_one_that_was_measured_has_its_time() -> None:
    assert seconds("h100") == pytest.approx(0.46058)
    assert seconds("h200") == pytest.approx(0.44953)
    assert seconds("h200", lora={"layers": "all"}) == pytest.approx(0.46893)
    align: dict[str, Any] = {
        "objective": "align",
        "data": {"texts": None},
        "lora": {"layers": "0-1", "modules": ["q_proj", "v_proj"]},
        "train": {"steps": 9, "batch_size": 6},
    }
    # words are taken to be 5 tokens long where there is no tokenizer: 60, filled up to 64
    assert seconds("h200", **align) == pytest.approx(0.00064)
    assert seconds("h200", **(align | {"train": {"batch_size": 12}})) is None
    assert seconds("h200", **(align | {"train": {"batch_size": 400}})) == pytest.approx(0.01333)
    assert seconds("a100") is None
    small: dict[str, Any] = {"method": "full", "quantize": "none", "double_quant": False}
    assert seconds("h200", "qwen2-1.5b") == pytest.approx(0.104)
    assert seconds("h200", "qwen2-1.5b", **small) == pytest.approx(0.15322)
    assert seconds("h200", **small) is None
    assert seconds("h200", "qwen2-1.5b", **small, train={"rounding": "stochastic"}) is None
    assert seconds("h200", "qwen2-72b", train={"batch_size": 2}) == pytest.approx(1.97967)


@pytest.mark.parametrize(
    "changes",
    [
        {"gib": 12},
        {"lora": {"dropout": 0.05}},
        {"lora": {"r": 8}},
        {"lora": {"layers": "0-3"}},
        {"train": {"batch_size": 2}},
        {"train": {"accumulate": 2}},
        {"train": {"optimizer": "adamw-8bit"}},
        {"train": {"cuda_graph": True}},
        {"train": {"engine": "modules"}},
        {"sft": {"attention": "sdpa"}},
        {"sft": {"context": 1024}, "train": {"batch_size": 8}},
        {"dtype": "float16"},
        {"weight_residency": "bf16"},
        {"quantize": "none", "double_quant": False},
        {"objective": "joint"},
    ],
    ids=str,
)
def test_what_was_not_measured_has_none(changes: dict[str, Any]) -> None:
    assert seconds("h100", **changes) is None
