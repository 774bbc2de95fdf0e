"""SmolLM2's weights: the engine against the published scripts, written with transformers + peft."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench.published import Training, add_adapters
from tli_engine.align.scan import scan
from tli_engine.cli import main
from tli_engine.data.words import pack
from tli_engine.models.early import load_early
from tli_engine.train.order import batch_rows

CPU = torch.device("cpu")


def test_scan_equals_one_word_at_a_time(
    smollm2: Any, full_model: nn.Module, tokenize: Any, lexicon: Any
) -> None:
    pairs = lexicon[:30]
    early = load_early(smollm2, 30, dtype=torch.float32, device=CPU)
    result = scan(
        early, "smollm2", pairs, tokenize(pairs.source, ""), tokenize(pairs.target, ""), "paper"
    )

    expected = torch.zeros(31)
    with torch.no_grad():
        for source, target in zip(pairs.source, pairs.target, strict=True):
            # one forward gives every layer: the published loop repeats it for each, to no effect
            a, b = (
                full_model(
                    **smollm2.tokenizer(w, return_tensors="pt"), output_hidden_states=True
                ).hidden_states
                for w in (source, target)
            )
            for layer in range(31):
                cosine = nn.functional.cosine_similarity(a[layer].mean(1), b[layer].mean(1))
                expected[layer] += cosine.item() / len(pairs)

    actual = torch.tensor([a.cosine_true for a in result.layers])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_truncated_model_equals_the_full_one(
    smollm2: Any, full_model: nn.Module, tokenize: Any, lexicon: Any, depth: int
) -> None:
    words = tokenize(lexicon.source[:8] + lexicon.target[:8], "")
    early = load_early(smollm2, depth, dtype=torch.float32, device=CPU)
    with torch.no_grad():
        expected = [
            full_model(
                input_ids=torch.tensor([w.input_ids]), output_hidden_states=True
            ).hidden_states[depth][0]
            for w in words
        ]
        for word, states in zip(words, expected, strict=True):
            assert (early(pack([word]), depth) - states).abs().max() == 0.0
        packed = early(pack(words), depth)

    # fp32 matmuls of other shapes round differently: 1e-5 of the largest activation, which is
    # in the hundreds from block 1 on
    scale = torch.cat(expected).abs().max()
    assert (packed - torch.cat(expected)).abs().max() / scale <= 1e-5


@pytest.fixture
def peft_initialised(smollm2: Any, tmp_path: Path) -> Path:
    """A PEFT adapter on all 30 blocks, freshly initialised, as the published code makes it."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_pretrained(smollm2.folder, dtype=torch.float32)
    add_adapters(model, dropout=0.0).save_pretrained(tmp_path / "initial")
    return tmp_path / "initial"


def published_training(
    folder: Path, adapter: Path, tokenizer: Any, pairs: Any, steps: int
) -> list[float]:
    """Losses of the published training on a tokenizer's own batches."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    training = Training(PeftModel.from_pretrained(model, adapter, is_trainable=True), steps)
    losses = []
    for step in range(steps):
        rows = batch_rows(len(pairs), 8, seed=0, step=step)
        anchor, positive = (
            tokenizer([side[i] for i in rows], padding=True, return_tensors="pt")
            for side in (pairs.source, pairs.target)
        )
        losses.append(training.step(anchor, positive))
    return losses


def test_paper_recipe_gives_the_published_losses(
    smollm2: Any, lexicon: Any, peft_initialised: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = ["quantize=none", "dtype=float32", "lora.dropout=0", "train.steps=20", "device=cpu"]
    settings += ["model=builtin:smollm2-135m", f"lora.init={peft_initialised}", "data.limit=200"]
    options = [part for setting in settings for part in ("--set", setting)]

    assert main(["train", "--recipe", "paper", "--run", str(run), *options]) == 0

    lines = (run / "metrics.jsonl").read_text().splitlines()
    actual = [json.loads(line)["loss"] for line in lines]
    pairs = lexicon[:200]
    expected = published_training(smollm2.folder, peft_initialised, smollm2.tokenizer, pairs, 20)
    # the schedule of both runs is over 20 steps, all of them warm-up
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=0, atol=1e-4)
    # a sequence that never moved would prove nothing
    assert max(expected) - min(expected) > 1e-3


def test_paper_recipe_collapses_and_says_so(smollm2: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ["model=builtin:smollm2-135m", "quantize=none", "train.steps=120", "device=cpu"]
    settings += ["data.limit=200"]
    options = [part for setting in settings for part in ("--set", setting)]

    assert main(["train", "--recipe", "paper", "--run", str(run), *options]) == 0

    (warning,) = json.loads((run / "evaluation.json").read_text())["warnings"]
    assert "collapse: random pairs' cosine rose from 0.9" in warning
    assert "the loss sits at its margin, 0.4" in warning
    assert "collapse" in (run / "adapter/README.md").read_text()
