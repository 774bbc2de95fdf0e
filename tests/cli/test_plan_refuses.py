"""What training refuses before it reads articles and weights, a plan refuses in the same words."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]
FULL = {"method": "full"}
LOWEST = {"layers": "1", "modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            FULL | {"train": {"optimizer": "adamw-8bit", "rounding": "stochastic"}},
            "train.rounding: stochastic goes with optimizer adamw, not adamw-8bit",
            id="rounding",
        ),
        pytest.param(
            FULL | {"train": {"rounding": "stochastic"}},
            "train.rounding: stochastic is of weights in bf16, and float32 needs no rounding",
            id="rounding-of-fp32",
        ),
        pytest.param(
            FULL | {"train": {"optimizer": "adamw-paged"}},
            "train.optimizer: adamw-paged needs a GPU; use adamw or adamw-8bit",
            id="paged",
        ),
        pytest.param(
            {"sft": {"attention": "varlen"}},
            "sft.attention: varlen needs train.engine: fused, on a GPU",
            id="attention-of-modules",
        ),
        pytest.param(
            {"sft": {"attention": "varlen"}, "train": {"engine": "fused"}},
            "sft.attention: varlen cannot run here: it needs a GPU, the model is on cpu",
            id="attention",
        ),
        pytest.param(
            {"prompt": {"template": "chat", "instruction": "Fupisha: {text}"}},
            "prompt.template: this tokenizer has no chat template; use plain",
            id="template",
        ),
        pytest.param(
            {"objective": "joint", "align": {"layer": 9}},
            "hidden_states[9] does not exist; it has 0 … 3",
            id="layer",
        ),
        pytest.param(
            {"objective": "joint", "align": {"layer": 1}, "lora": LOWEST},
            "lora.layers: the alignment loss reads hidden_states[1]",
            id="unreached",
        ),
        pytest.param({"objective": "joint", "data": {"pairs": "none.csv"}}, "none.csv", id="pairs"),
        pytest.param({"distributed": {"weights": "sharded"}}, "there is one process", id="sharded"),
        pytest.param({"sft": {"context": 9999}}, "sft.context: 9999 is more than", id="context"),
    ],
)
def test_a_plan_refuses_what_training_refuses(
    changes: dict[str, Any], message: str, cli: Cli, sft_config: Callable[..., Path]
) -> None:
    path = sft_config(**changes)
    trained = cli("train", path, "--run", "run")
    assert (trained.status, trained.out) == (2, "")
    assert message in trained.err
    refused = trained.err.splitlines()[-1]
    for planned in (cli("plan", path), cli("train", path, "--dry-run")):
        assert (planned.status, planned.out) == (2, "")
        assert planned.err.splitlines() == [refused]


@pytest.mark.parametrize(
    ("train", "module"),
    [({"optimizer": "adamw-8bit"}, "bitsandbytes"), ({"tensorboard": True}, "tensorboard")],
)
def test_a_library_is_asked_for_here_alone(
    train: dict[str, Any],
    module: str,
    cli: Cli,
    sft_config: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = sft_config(train=train)
    for name in (module, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    trained = cli("train", path, "--run", "run")
    planned = cli("plan", path)
    assert trained.status == planned.status == 2
    assert "not installed; pip install" in planned.err
    assert planned.err == trained.err.splitlines()[-1] + "\n"
    # of another machine it is not known
    assert cli("plan", path, "--device", "h100").status == 0
