"""The section ``compare``: which run each arm is."""

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch

from tli_engine.config import read_recipe, recipe_names
from tli_engine.data.texts import read_texts
from tli_engine.errors import ConfigError
from tli_engine.evaluate.compare.conclusions import ENOUGH_ARTICLES, ENOUGH_SEEDS
from tli_engine.evaluate.compare.config import ARMS, arm_config, split_config
from tli_engine.train.energy import energy_joules, read_energy


def split(**changes: Any) -> Any:
    values = {"model": "m", "data": "xlsum:swahili", "quantize": "nf4", "lora": {"layers": "0-1"}}
    return split_config(values | changes, "c.yaml")


def test_comparisons_are_no_runs() -> None:
    assert recipe_names("compare") == ["compare-demo"]
    assert "compare-demo" not in recipe_names()
    with pytest.raises(ConfigError, match="no recipe 'compare-demo'"):
        read_recipe("compare-demo")
    shared, settings = split_config(read_recipe("compare-demo", "compare"), "recipe")
    assert settings.arms == ("full", "lora-early", "tli-then-lora-early")
    assert shared.data.texts == "builtin:sw-demo"
    # its report opens with what it is too small for
    tested = read_texts(shared.data, "test")
    assert tested is not None
    assert len(tested) < ENOUGH_ARTICLES
    assert len(settings.seeds) < ENOUGH_SEEDS


def test_arms_differ_in_what_they_are_called_after() -> None:
    shared, settings = split(compare={"set": {"joint": {"lora": {"r": 3}}}})
    arms = {arm: arm_config(shared, settings, arm, 7, Path("out")) for arm in (*ARMS, "tli")}
    assert settings.reference == "full"
    assert {config.seed for config in arms.values()} == {7}
    assert [arm for arm, c in arms.items() if c.method == "full"] == ["full"]
    # weights that are trained are not held in NF4
    assert [arm for arm, c in arms.items() if c.quantize == "none"] == ["full"]
    assert [arm for arm, c in arms.items() if c.lora.layers == "all"] == ["lora-all"]
    assert [arm for arm, c in arms.items() if c.lora.init] == ["tli-then-lora-early"]
    assert arms["tli-then-lora-early"].lora.init == "out/tli-7/adapter"
    assert [arm for arm, c in arms.items() if c.lora.r == 3] == ["joint"]
    assert split(compare={"arms": ["joint", "lora-all"]})[1].reference == "joint"


def test_the_align_run_has_no_part_in_what_is_said_of_texts() -> None:
    texts = {"accumulate": 2, "optimizer": "adamw-8bit", "lora_plus": 4.0}
    shared, settings = split(train=texts)
    assert arm_config(shared, settings, "lora-early", 0, Path()).train.lora_plus == 4.0
    train = arm_config(shared, settings, "tli", 0, Path()).train
    assert (train.accumulate, train.optimizer, train.lora_plus) == (1, "adamw", 1.0)


def test_an_arm_has_no_part_in_what_is_said_of_another_method() -> None:
    shared, settings = split(train={"lora_plus": 4.0}, lora={"init": "adapter"})
    full, early = (arm_config(shared, settings, arm, 0, Path()) for arm in ("full", "lora-early"))
    assert (full.train.lora_plus, full.lora.init) == (1.0, None)
    assert (early.train.lora_plus, early.lora.init) == (4.0, "adapter")
    shared, settings = split(method="full", quantize="none", train={"rounding": "stochastic"})
    roundings = {arm: arm_config(shared, settings, arm, 0, Path()).train.rounding for arm in ARMS}
    assert [arm for arm, rounding in roundings.items() if rounding == "stochastic"] == ["full"]


@pytest.mark.parametrize("length", [{"steps": 9}, {"epochs": 2}])
def test_an_arm_may_have_a_length_of_its_own(length: dict[str, int]) -> None:
    shared, settings = split(compare={"set": {"tli": {"train": length}}}, train={"steps": 4})
    train = arm_config(shared, settings, "tli", 0, Path()).train
    assert (train.steps, train.epochs) == (length.get("steps"), length.get("epochs"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"compare": []}, "c.yaml: compare: must be a section of keys"),
        ({"compare": {"arms": []}}, "c.yaml: compare.arms: "),
        ({"compare": {"set": {"half": {}}}}, "c.yaml: compare.set.half: input should be 'full', "),
        (
            {"compare": {"arms": ["full"], "set": {"joint": {"train": {"stepz": 1}}}}},
            "arm joint: train.stepz: unknown",
        ),
        ({"compare": {"set": {"full": {"train": {"stepz": 1}}}}}, "arm full: train.stepz: unknown"),
        (
            {"data": "a.jsonl", "train": {"batch_size": 1}},
            "arm tli: .*batch_size must be at least 2",
        ),
        ({"model": None}, "c.yaml: model"),
        *(
            ({"compare": {"set": {"joint": change}}}, f"compare.set.joint: {key} must be the same")
            for key, change in (
                ("data", {"data": {"texts_limit": 9}}),
                ("seed", {"seed": 1}),
                ("align.layer", {"align": {"layer": 1}}),
                ("sft.context", {"sft": {"context": 64}}),
            )
        ),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        split(**changes)


class Library:
    """A management library with one GPU, or with none that counts."""

    def __init__(self, status: int) -> None:
        self.status = status
        self.shut = 0

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlShutdown(self) -> None:
        self.shut += 1

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:
        return 0 if uuid == b"GPU-1" else 6

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, millijoules: Any) -> int:
        ctypes.cast(millijoules, ctypes.POINTER(ctypes.c_ulonglong))[0] = 2500
        return self.status


def test_energy_where_it_is_counted() -> None:
    assert energy_joules(torch.device("cpu")) is None
    library: Any = Library(0)
    assert read_energy(library, "GPU-1") == 2.5
    assert read_energy(library, "GPU-2") is None
    assert library.shut == 2
    silent: Any = Library(3)
    assert read_energy(silent, "GPU-1") is None
