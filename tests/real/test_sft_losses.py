"""Fine-tuning SmolLM2's weights: 20 steps give transformers' and PEFT's losses, step for step."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tli_engine.config import RunConfig
from tli_engine.data.examples import ExampleTokenizer
from tli_engine.data.texts import Article
from tli_engine.models.adapters import adapter_tensors, add_lora
from tli_engine.models.causal import CausalModel, load_causal
from tli_engine.models.files import ModelFiles
from tli_engine.testing import example_store
from tli_engine.train.sft_loop import SftMetrics, SftTrainer
from tli_engine.train.sft_order import SftOrder
from tli_engine.train.sft_step import SftStep

STEPS = 20
# written for this test
TEXTS = [
    ("Mvua kubwa ilinyesha usiku kucha na barabara nyingi zimefungwa.", "Mvua yafunga barabara"),
    ("Timu ya wasichana imeshinda kombe baada ya mchezo mgumu.", "Wasichana watwaa kombe"),
    ("Bei ya mahindi imepanda kwa sababu mavuno yalikuwa madogo.", "Mahindi yapanda bei"),
    ("Daraja jipya litaunganisha vijiji viwili vilivyotengwa na mto.", "Daraja kuunganisha vijiji"),
    ("Wanafunzi wamepanda miti elfu moja karibu na shule yao.", "Wanafunzi wapanda miti"),
    ("Hospitali imepata mashine mpya ya kupima damu.", "Mashine mpya hospitalini"),
]


def config_of(method: str) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": "builtin:smollm2-135m", "objective": "sft", "method": method, "data": "a.jsonl",
            "prompt": {"template": "plain", "instruction": "Fupisha: {text}\nMuhtasari:"},
            "lora": {"layers": "0-2", "modules": ("q_proj", "v_proj", "down_proj")},
            "sft": {"context": 64},
            "train": {
                "steps": STEPS, "batch_size": 1, "schedule": "constant",
                "learning_rate": 1e-3 if method == "lora" else 1e-5,
            },
        }
    )  # fmt: skip


def theirs_of(config: RunConfig, model: Any, ours: CausalModel) -> tuple[Any, list[nn.Parameter]]:
    """transformers' model with PEFT's adapters, or all its weights to be trained."""
    if config.method == "full":
        model.requires_grad_(True)
        return model, list(model.parameters())
    peft = pytest.importorskip("peft")
    lora = config.lora
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=lora.r, lora_alpha=lora.alpha, target_modules=list(lora.modules),
            layers_to_transform=[0, 1, 2],
        ),
    )  # fmt: skip
    named, trained = dict(adapted.named_parameters()), []
    for name, tensor in adapter_tensors(ours.early).items():
        parameter = named[f"base_model.model.model.{name.removesuffix('.weight')}.default.weight"]
        parameter.data.copy_(tensor.detach())
        trained.append(parameter)
    return adapted, trained


@pytest.mark.parametrize("method", ["lora", "full"])
def test_20_steps_give_transformers_losses(smollm2: ModelFiles, method: str) -> None:
    from transformers import AutoModelForCausalLM

    config = config_of(method)
    tokenize = ExampleTokenizer(smollm2.tokenizer, config.prompt, config.sft.context)
    store = example_store(tokenize([Article(*text, "test") for text in TEXTS]))
    model = load_causal(smollm2, dtype=torch.float32, device=torch.device("cpu"))
    if method == "full":
        model.train_all()
    else:
        add_lora(model.early, config.lora, model.early.depth, config.seed)
    base: Any = AutoModelForCausalLM.from_pretrained(smollm2.folder, dtype=torch.float32)
    theirs, trained = theirs_of(config, base, model)
    order = SftOrder(store.lengths, config)
    steps: list[SftMetrics] = []
    engine = SftStep(model, model.trainable(), store, order, config, None)
    SftTrainer(config, model, engine, order, None, steps.append).run()
    groups = [{"params": [p], "weight_decay": 0.01 if p.ndim > 1 else 0.0} for p in trained]
    optimizer = torch.optim.AdamW(groups, lr=config.train.learning_rate)
    for step in steps:
        examples = [store[i] for row in order.batches(step.step - 1)[0] for i in row]
        assert sum(map(len, examples)) == step.tokens <= 128
        loss = torch.zeros(())
        for example in examples:
            ids = torch.tensor([example.input_ids])
            logits = theirs(ids).logits[0, example.prompt - 1 : -1]
            loss += nn.functional.cross_entropy(logits, ids[0, example.prompt :], reduction="sum")
        loss = loss / step.labels
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        assert step.loss == pytest.approx(loss.item(), abs=1e-4), step.step
    # both learnt something, over the same texts
    epoch = len(TEXTS)
    assert np.mean([s.loss for s in steps[-epoch:]]) < np.mean([s.loss for s in steps[:epoch]])
