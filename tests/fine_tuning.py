"""Trainers of fine-tuning on a tiny model, for tests of their steps."""

from typing import Any

import torch
from torch import nn

from tli_engine.config import RunConfig
from tli_engine.data.examples import Example
from tli_engine.models.adapters import adapter_tensors, add_lora
from tli_engine.models.causal import CausalModel, load_causal
from tli_engine.models.files import ModelFiles
from tli_engine.testing import example_store
from tli_engine.train.sft_loop import SftMetrics, SftTrainer, Validation
from tli_engine.train.sft_order import SftOrder
from tli_engine.train.sft_step import Pairs, SftStep

EXAMPLES = [
    Example(
        tuple(torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)).tolist()), p
    )
    for n, p in [(9, 5), (14, 8), (7, 6), (20, 3), (11, 10), (16, 9), (13, 4), (8, 1)]
]


def config_of(method: str = "lora", **changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "model": "m", "objective": "sft", "method": method,
        "data": {"texts": "a.jsonl", "validation": "b.jsonl"},
        "lora": {"layers": "0-2", "modules": ("q_proj", "down_proj"), "r": 4, "alpha": 8},
        "sft": {"context": 32, "evaluate_steps": 2},
        "train": {"steps": 6, "batch_size": 1, "learning_rate": 1e-2, "warmup_steps": 2},
    }  # fmt: skip
    for section, change in changes.items():
        values[section] = values.get(section, {}) | change if isinstance(change, dict) else change
    return RunConfig.model_validate(values)


def model_of(files: ModelFiles, config: RunConfig) -> tuple[CausalModel, dict[str, nn.Parameter]]:
    model = load_causal(files, dtype=torch.float32, device=torch.device("cpu"))
    if config.method == "full":
        model.train_all()
        return model, model.trainable()
    add_lora(model.early, config.lora, model.early.depth, config.seed)
    return model, adapter_tensors(model.early)


def trainer_of(
    files: ModelFiles, config: RunConfig, pairs: Pairs | None = None, validate: bool = False
) -> tuple[SftTrainer, list[SftMetrics]]:
    model, tensors = model_of(files, config)
    store = example_store(EXAMPLES)
    order = SftOrder(store.lengths, config)
    engine = SftStep(model, tensors, store, order, config, pairs)
    unseen = Validation(example_store(EXAMPLES[:3]), [[[0, 1]], [[2]]]) if validate else None
    steps: list[SftMetrics] = []
    return SftTrainer(config, model, engine, order, unseen, steps.append), steps
