"""The published recipe on SmolLM2's weights, by fused steps and by transformers' modules."""

from typing import Any

import pytest
import torch

from tli_engine.align.retrieval import measure_alignment
from tli_engine.config import apply_overrides, read_recipe, resolve_config
from tli_engine.evaluate.alignment import encode_before_after
from tli_engine.models.device import choose_device
from tli_engine.train.loop import StepMetrics, Trainer
from tli_engine.train.prepare import Prepared, prepare

PAIRS, BATCH = 623, 8
DEVICE = str(choose_device("auto"))


def train(engine: str, *settings: str) -> tuple[Prepared, list[StepMetrics]]:
    values = apply_overrides(
        read_recipe("paper"),
        [
            "model=builtin:smollm2-135m", "quantize=none", "dtype=float32", f"device={DEVICE}",
            f"data.limit={PAIRS}", f"train.engine={engine}", *settings,
        ],
    )  # fmt: skip
    run = prepare(resolve_config(values, "paper"), lambda line: None)
    steps: list[StepMetrics] = []
    Trainer(run.model, run.config, run.splits[0], run.space, steps.append).run()
    return run, steps


def scores(run: Prepared) -> dict[str, float]:
    """Retrieval of the trained pairs after training, at the layer trained."""
    split, layer = run.splits[0], run.config.align.layer
    after = encode_before_after(run.model, split, [layer], "content")[layer].after
    return measure_alignment(*after.chunk(2), *split.groups).to_json()


def test_390_steps_give_the_modules_losses_and_scores(smollm2: Any) -> None:
    plain, expected = train("modules", "lora.dropout=0")
    fused, steps = train("fused", "lora.dropout=0")
    assert len(steps) == 5 * (PAIRS // BATCH + 1) == 390
    for one, other in zip(steps, expected, strict=True):
        assert one.loss == pytest.approx(other.loss, abs=1e-3), one.step
        assert one.cosine_true == pytest.approx(other.cosine_true, abs=1e-3), one.step
    ours, theirs = scores(fused), scores(plain)
    assert ours["cosine_true"] == pytest.approx(theirs["cosine_true"], abs=1e-3)
    assert ours["mrr"] == pytest.approx(theirs["mrr"], abs=2e-3)


def test_dropout_of_either_kind_trains_alike(smollm2: Any) -> None:
    """Other masks, one distribution: the mean over five seeds is within the seeds' spread."""
    settings = ["lora.dropout=0.3", "train.steps=24", "align.loss=infonce"]
    ends = {}
    for engine in ("modules", "fused"):
        runs = [train(engine, *settings, f"seed={seed}")[1] for seed in range(5)]
        ends[engine] = torch.tensor([sum(s.loss for s in steps[-12:]) / 12 for steps in runs])
    gap = (ends["fused"].mean() - ends["modules"].mean()).abs()
    spread = (ends["fused"].var() + ends["modules"].var()).sqrt()
    assert gap < 2 * spread
    # the masks do differ, and they do something
    assert not torch.equal(ends["fused"], ends["modules"])
