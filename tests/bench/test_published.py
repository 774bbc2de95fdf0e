"""The published procedure of the benches against the engine, on a tiny model of random NF4 weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.models import Subject
from bench.published import (
    Training,
    add_adapters,
    embed,
    evaluate_pair,
    exit_early,
    padded,
    scan_pair,
)
from tli_engine.align.objective import batch_loss, pair_batch
from tli_engine.align.scan import scan
from tli_engine.align.space import fit_space
from tli_engine.evaluate.alignment import encode_before_after
from tli_engine.models.adapters import adapter_tensors, add_lora
from tli_engine.models.early import EarlyModel

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")

PAIRS = 6


Make = Callable[..., Subject]


@pytest.fixture(params=["llama", "qwen2"])
def subject(request: pytest.FixtureRequest, tiny_subject: Make) -> Subject:
    return tiny_subject(request.param, nf4=True)


@pytest.fixture(params=["llama", "qwen2"])
def dense(request: pytest.FixtureRequest, tiny_subject: Make) -> Subject:
    """Without NF4: bitsandbytes infers in bf16 on some CPUs, whatever dtype it is told."""
    return tiny_subject(request.param)


def adapted(subject: Subject) -> tuple[EarlyModel, Any]:
    """The engine's model and the published one, with the same adapters on blocks 0 and 1."""
    early = subject.early(2)
    lora = subject.config.lora.model_copy(update={"dropout": 0.0})
    add_lora(early, lora, 2, seed=0)
    model = add_adapters(subject.causal_lm(), dropout=0.0)
    theirs = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in adapter_tensors(early).items():
            # with B at zero the adapters would do nothing
            tensor.copy_(0.1 * torch.randn_like(tensor))
            name = name.replace(".weight", ".default.weight")
            theirs[f"base_model.model.model.{name}"].copy_(tensor)
            tensor.requires_grad_(True)
    return early, model


def engine_loss(early: EarlyModel, subject: Subject) -> Tensor:
    train = subject.splits[0]
    numbers = list(range(PAIRS))
    batch = pair_batch(train.source[:PAIRS], train.target[:PAIRS], numbers, numbers, False)
    space = fit_space("raw", torch.empty(0), torch.empty(0))
    return batch_loss(early, batch, space, subject.config.align).loss


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_steps_equal_the_engines(subject: Subject, cut: bool) -> None:
    early, model = adapted(subject)
    if cut:
        exit_early(model.get_base_model(), 2)
    training = Training(model.train(), total_steps=10, warmup_steps=1)
    optimizer = torch.optim.AdamW(adapter_tensors(early).values(), lr=0)
    train = subject.splits[0]

    losses = []
    for _ in range(3):
        optimizer.param_groups[0]["lr"] = training.schedule.get_last_lr()[0]
        expected = engine_loss(early, subject)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        actual = training.step(padded(train.source[:PAIRS]), padded(train.target[:PAIRS]))
        torch.testing.assert_close(actual, expected.item(), rtol=0, atol=1e-5)
        losses.append(actual)
    # a loss that never moved would prove nothing of the updates
    assert abs(losses[2] - losses[1]) > 1e-4


def test_cut_model_runs_no_block_above_the_loss(dense: Subject) -> None:
    train = dense.splits[0]
    whole, cut = dense.causal_lm(), dense.causal_lm(depth=2)
    exit_early(cut, 2)
    with torch.no_grad():
        expected = embed(whole, padded(train.source[:PAIRS]), 2)
        actual = embed(cut, padded(train.source[:PAIRS]), 2)
    assert len(cut.model.layers) == 2
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_scan_equals_the_engines(dense: Subject) -> None:
    train = dense.splits[0]
    model, early = dense.causal_lm(), dense.early(4)
    source, target = train.source[:PAIRS], train.target[:PAIRS]
    result = scan(early, "tiny", train.pairs[:PAIRS], source, target, "paper")
    cosines = [
        scan_pair(model, padded([s]), padded([t]), range(4))
        for s, t in zip(source, target, strict=True)
    ]
    actual = [a.cosine_true for a in result.layers[:4]]
    torch.testing.assert_close(
        torch.tensor(actual), torch.tensor(cosines).mean(0), rtol=0, atol=1e-5
    )


def test_evaluation_equals_the_engines(dense: Subject) -> None:
    early, model = adapted(dense)
    control = dense.splits[1]
    vectors = encode_before_after(early, control, [2], "content")[2]
    stages = (vectors.before, vectors.after)
    before, after = (torch.cosine_similarity(*stage.chunk(2)) for stage in stages)
    base = dense.causal_lm()
    for i in range(PAIRS):
        sides = (padded([side[i]]) for side in (control.source, control.target))
        pair = evaluate_pair(base, model.eval(), *sides, 2, dense.special)
        torch.testing.assert_close(pair, (before[i].item(), after[i].item()), rtol=0, atol=1e-5)
        assert pair[0] != pytest.approx(pair[1], abs=1e-3)
