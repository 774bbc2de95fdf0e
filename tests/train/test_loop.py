"""The training loop on a tiny model: what it computes, repeats, reports and refuses."""

import dataclasses
import hashlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tli_engine.align.encode import encode
from tli_engine.align.losses import alignment_loss
from tli_engine.align.objective import BatchLoss
from tli_engine.align.space import fit_space
from tli_engine.config import RunConfig
from tli_engine.data.pairs import PairList
from tli_engine.data.splits import Split
from tli_engine.data.words import Word, pack
from tli_engine.errors import TrainingError
from tli_engine.models.adapters import adapter_tensors, add_lora, wrap
from tli_engine.models.early import EarlyModel, load_early
from tli_engine.models.files import ModelFiles, open_model
from tli_engine.testing import random_words, save_tiny_model
from tli_engine.train import module_step
from tli_engine.train.loop import StepMetrics, Trainer
from tli_engine.train.order import batch_rows
from tli_engine.train.schedule import learning_rate

pytestmark = pytest.mark.usefixtures("one_thread")
PAIRS = 13


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return open_model(str(save_tiny_model(tmp_path_factory.mktemp("llama"), "llama")))


def toy_pairs() -> Split:
    """Random words; the first source is there twice, with two translations."""
    source, target = random_words(PAIRS, 5, seed=1), random_words(PAIRS, 5, seed=2)
    source[1] = source[0]
    texts = [tuple(str(w.input_ids) for w in side) for side in (source, target)]
    return Split("train", PairList(("sw", "en"), *texts), source, target)


@dataclasses.dataclass
class Run:
    trainer: Trainer
    model: EarlyModel
    steps: list[StepMetrics] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)

    def digest(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(adapter_tensors(self.model).items()):
            digest.update(name.encode() + tensor.detach().numpy().tobytes())
        return digest.hexdigest()


Start = Callable[..., Run]


@pytest.fixture
def start(files: ModelFiles) -> Start:
    """A trainer of a tiny model, ready to run; sections of the configuration by name."""

    def make(seed: int = 0, **sections: dict[str, Any]) -> Run:
        values: dict[str, Any] = {
            "align": {"layer": 2},
            "lora": {"r": 4, "alpha": 8},
            "train": {"steps": 4, "batch_size": 4, "learning_rate": 1e-2},
        }
        for name, section in sections.items():
            values[name] |= section
        config = RunConfig(model="tiny", seed=seed, **values)
        pairs = toy_pairs()
        model = load_early(files, 2, dtype=torch.float32, device=torch.device("cpu"))
        sides = (
            encode(model, words, [2], config.align.pooling)[0]
            for words in (pairs.source, pairs.target)
        )
        space = fit_space(config.align.space, *sides)
        add_lora(model, config.lora, 2, seed)
        steps: list[StepMetrics] = []
        warnings: list[str] = []
        trainer = Trainer(model, config, pairs, space, steps.append, warnings.append)
        return Run(trainer, model, steps, warnings)

    return make


@pytest.mark.parametrize("loss", ["infonce", "triplet-hardest", "triplet-semihard"])
@pytest.mark.parametrize("space", ["raw", "whitened"])
def test_the_loss_falls(loss: str, space: str, start: Start) -> None:
    run = start(
        align={"loss": loss, "space": space, "temperature": 0.2},
        train={"steps": 60},
        lora={"modules": ("q_proj", "v_proj", "down_proj")},
    )
    run.trainer.run()
    assert len(run.steps) == 60
    first, last = ([s.loss for s in part] for part in (run.steps[:8], run.steps[-8:]))
    assert sum(last) < 0.7 * sum(first)
    apart = [s.cosine_true - s.cosine_random for s in (run.steps[0], run.steps[-1])]
    assert apart[1] > apart[0]


def test_a_step_has_a_batch_of_pairs_or_all_of_them(start: Start) -> None:
    sizes = [start(train={"batch_size": size}).trainer.rows_of_step for size in (4, 12, 64)]
    # the last pair alone has no negative
    assert sizes == [4, PAIRS, PAIRS]


def test_every_step_is_reported_in_full(start: Start) -> None:
    run = start(train={"epochs": 3, "steps": None, "warmup_steps": 2})
    run.trainer.run()
    # 13 pairs by 4: the one left over joins the third batch
    assert (run.trainer.steps_per_epoch, run.trainer.total_steps) == (3, 9)
    assert [s.step for s in run.steps] == list(range(1, 10))
    assert [s.epoch for s in run.steps] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    config = run.trainer.config.train
    assert [s.lr for s in run.steps] == [learning_rate(config, i, 9) for i in range(9)]
    names = [f.name for f in dataclasses.fields(StepMetrics)]
    for step in run.steps:
        report = step.to_json()
        assert list(report) == names
        assert all(type(v) in (int, float) and math.isfinite(v) for v in report.values())
        assert min(step.grad_norm, step.tokens_per_s, step.seconds, step.peak_mib) > 0
        assert -1 <= step.cosine_random < 1
    assert run.warnings == []


def naive_vectors(model: EarlyModel, words: list[Word]) -> Tensor:
    rows = []
    for word in words:
        rows.append(model(pack([word]), 2)[list(word.content)].mean(0))
    return torch.stack(rows)


def test_steps_are_those_of_a_plain_loop(start: Start) -> None:
    """A word at a time, one tensor after the other, with nothing of the trainer's own."""
    settings = {"steps": 6, "warmup_steps": 2, "weight_decay": 0.1, "max_grad_norm": 0.05}
    run, plain = (start(seed=5, train=settings) for _ in range(2))
    run.trainer.run()

    config, pairs = plain.trainer.config, plain.trainer.pairs
    parameters = list(adapter_tensors(plain.model).values())
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.1)
    scheduled = [0, 0.5e-2, 1e-2, 0.75e-2, 0.5e-2, 0.25e-2]
    for step, lr in enumerate(scheduled):
        rows = batch_rows(PAIRS, 4, 5, step)
        x, y = (
            naive_vectors(plain.model, [side[i] for i in rows])
            for side in (pairs.source, pairs.target)
        )
        # pairs 0 and 1 share their source
        is_negative = torch.tensor([[i != j and {i, j} != {0, 1} for j in rows] for i in rows])
        cosine = torch.cosine_similarity(x[:, None], y[None], dim=-1)
        loss = alignment_loss(cosine, is_negative, config.align)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.05)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()

        reported = run.steps[step]
        assert reported.lr == pytest.approx(lr)
        assert reported.loss == pytest.approx(loss.item(), rel=1e-4)
        # before clipping
        assert reported.grad_norm == pytest.approx(norm.item(), rel=1e-3)
        assert reported.cosine_true == pytest.approx(cosine.diagonal().mean().item(), abs=1e-4)
    assert max(s.grad_norm for s in run.steps) > 0.05
    for ours, theirs in zip(adapter_tensors(run.model).values(), parameters, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_one_seed_gives_one_adapter(dropout: float, start: Start) -> None:
    def trained(seed: int, noise: int) -> tuple[str, list[float]]:
        run = start(seed=seed, lora={"dropout": dropout})
        # whatever the caller has drawn before
        torch.manual_seed(noise)
        run.trainer.run()
        return run.digest(), [s.loss for s in run.steps]

    first = trained(7, noise=1)
    assert trained(7, noise=2) == first
    assert trained(8, noise=1) != first


def test_dropout_is_on_while_training_and_off_afterwards(start: Start) -> None:
    run = start(lora={"dropout": 0.5})
    run.trainer.run()
    losses = [s.loss for s in run.steps]
    without = start(lora={"dropout": 0.0})
    without.trainer.run()
    # B is zero in the first step, in which dropout thus changes nothing
    assert losses[0] == without.steps[0].loss
    assert losses[1:] != [s.loss for s in without.steps[1:]]
    assert not any(m.training for m in run.model.modules())


def test_the_callers_random_state_is_left_alone(start: Start) -> None:
    run = start(lora={"dropout": 0.3})
    before = torch.get_rng_state()
    run.trainer.run()
    assert torch.equal(torch.get_rng_state(), before)


def test_only_adapters_are_trained(start: Start) -> None:
    run = start(train={"weight_decay": 0.5})
    digest, before = run.model.base_digest(), run.digest()
    run.trainer.run()
    assert run.model.base_digest() == digest
    assert run.digest() != before
    trainable = {n for n, p in run.model.decoder.named_parameters() if p.requires_grad}
    assert trainable == set(adapter_tensors(run.model))


def test_a_run_can_stop_and_go_on(start: Start) -> None:
    whole = start(lora={"dropout": 0.2}, train={"steps": 6})
    whole.trainer.run()

    first = start(lora={"dropout": 0.2}, train={"steps": 6})
    first.trainer.run(until=lambda: first.trainer.step == 2)
    assert [s.step for s in first.steps] == [1, 2]
    first.trainer.run()
    assert [s.loss for s in first.steps] == [s.loss for s in whole.steps]
    assert first.digest() == whole.digest()


def test_state_restores_a_run_exactly(start: Start) -> None:
    whole = start(lora={"dropout": 0.2}, train={"steps": 6})
    whole.trainer.run(until=lambda: whole.trainer.step == 3)
    adapter, statistics = ({n: t.clone() for n, t in p.items()} for p in whole.trainer.state())
    whole.trainer.run()

    resumed = start(lora={"dropout": 0.2}, train={"steps": 6})
    resumed.trainer.restore(3, adapter, statistics)
    resumed.trainer.run()
    assert [s.loss for s in resumed.steps] == [s.loss for s in whole.steps[3:]]
    assert resumed.digest() == whole.digest()


def test_an_adapter_that_the_loss_does_not_see_is_named(files: ModelFiles, start: Start) -> None:
    run = start()
    deeper = load_early(files, 3, dtype=torch.float32, device=torch.device("cpu"))
    add_lora(deeper, run.trainer.config.lora, 2, seed=0)
    above = wrap(deeper, "layers.2.self_attn.v_proj", r=2, alpha=2)
    for half in (above.lora_A, above.lora_B):
        torch.nn.init.zeros_(half.weight)
    trainer = dataclasses.replace(run.trainer, model=deeper)
    message = r"no gradient reaches layers\.2\.self_attn\.v_proj\.lora_A\.weight"
    with pytest.raises(TrainingError, match=message):
        trainer.run()
    assert trainer.step == 0
    assert not deeper.training


def poison(monkeypatch: pytest.MonkeyPatch, step: int, value: float) -> None:
    """From a step on, counted from 0, the loss is multiplied by ``value``."""
    original, calls = module_step.batch_loss, iter(range(1000))

    def poisoned(*args: Any) -> BatchLoss:
        result = original(*args)
        factor = value if next(calls) >= step else 1.0
        return dataclasses.replace(result, loss=result.loss * factor)

    monkeypatch.setattr(module_step, "batch_loss", poisoned)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_a_loss_that_is_not_finite_stops_the_run(
    value: float, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, untouched = start(), start()
    untouched.trainer.run(until=lambda: untouched.trainer.step == 2)
    poison(monkeypatch, 2, value)
    before = torch.get_rng_state()
    with pytest.raises(TrainingError, match=f"step 3: loss {value}, .*lower train.learning_rate"):
        run.trainer.run()
    # the steps before are reported, and the broken one has changed nothing
    assert [s.step for s in run.steps] == [1, 2]
    assert run.digest() == untouched.digest()
    assert not run.model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_a_first_gradient_that_is_not_finite_is_named(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 0, math.nan)
    message = r"the gradient of layers\.0\.self_attn\.q_proj\.lora_A\.weight is not finite"
    with pytest.raises(TrainingError, match=message):
        start().trainer.run()


def test_a_collapse_is_passed_on_once(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = module_step.batch_loss, iter(range(1000))

    def collapsing(*args: Any) -> BatchLoss:
        result, way = original(*args), min(1.0, next(calls) / 40)
        alike = torch.tensor(0.3 + 0.69 * way)
        return BatchLoss(result.loss * 0 + 0.4, alike + 0.005, alike)

    monkeypatch.setattr(module_step, "batch_loss", collapsing)
    run = start(
        align={"loss": "triplet-hardest", "margin": 0.4}, train={"steps": 80, "warmup_steps": 0}
    )
    run.trainer.run()
    (warning,) = run.warnings
    assert warning.startswith("step ")
    assert "collapse: random pairs' cosine rose from 0.4" in warning
    assert warning.endswith("the loss sits at its margin, 0.4")


def test_a_batch_of_one_word_repeated_has_no_loss(start: Start) -> None:
    """Pairs that share a word are no negatives: nothing to learn, nothing to fail on."""
    run = start(train={"steps": 2, "batch_size": 2, "weight_decay": 0.0})
    pairs = toy_pairs()
    one = pairs.source[0]
    alone = Split(
        "train", PairList(("sw", "en"), ("a", "a"), ("b", "c")), [one, one], pairs.target[:2]
    )
    before = run.digest()
    trainer = dataclasses.replace(run.trainer, pairs=alone)
    trainer.run()
    assert [s.loss for s in run.steps] == [0, 0]
    assert all(math.isnan(s.cosine_random) for s in run.steps)
    assert run.digest() == before
