"""What is advised where memory runs out is what the run does not do yet, and can."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tli_engine.config import TrainConfig
from tli_engine.models.causal import load_causal
from tli_engine.models.files import open_model
from tli_engine.testing import save_tiny_model
from tli_engine.train import updates as updates_module
from tli_engine.train.memory import out_of_memory
from tli_engine.train.updates import Updates


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({}, "sft.context, set sft.activations=recompute, or train.optimizer=adamw-8bit"),
        (
            {"optimizer": "adamw-8bit"},
            "sft.context, set sft.activations=recompute, or train.optimizer=adamw-paged-8bit",
        ),
        ({"optimizer": "adamw-paged-8bit"}, "sft.context, or set sft.activations=recompute"),
        ({"rounding": "stochastic"}, "sft.context, or set sft.activations=recompute"),
    ],
    ids=str,
)
def test_the_optimizer_that_is_advised_is_a_smaller_one(
    settings: dict[str, Any], advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # bitsandbytes may be missing, and its paged optimizers need a GPU
    monkeypatch.setattr(updates_module, "check_optimizer", lambda train, device: None)
    monkeypatch.setattr(updates_module, "bitsandbytes_optimizer", lambda name: torch.optim.AdamW)
    files = open_model(str(save_tiny_model(tmp_path, "llama")))
    model = load_causal(files, dtype=torch.bfloat16, device=torch.device("cpu"))
    model.train_all()
    updates = Updates(model.trainable(), TrainConfig(**settings))
    assert out_of_memory(model, updates, RuntimeError("no room")).endswith(advice)
