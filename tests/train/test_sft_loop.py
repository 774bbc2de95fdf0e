"""Fine-tuning on a tiny model: losses are transformers', and every promise of the loop holds."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.fine_tuning import EXAMPLES, config_of, model_of, trainer_of
from tli_engine.align.space import fit_space
from tli_engine.config import RunConfig
from tli_engine.data.pairs import PairList
from tli_engine.data.splits import tokenize_splits
from tli_engine.errors import TrainingError, UserError
from tli_engine.models.files import ModelFiles, open_model
from tli_engine.testing import example_store, save_tiny_model
from tli_engine.train.sft_loop import SftTrainer
from tli_engine.train.sft_order import SftOrder
from tli_engine.train.sft_prepare import fuse_for_texts
from tli_engine.train.sft_step import Pairs, SftStep

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return open_model(str(save_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama")))


def by_transformers(files: ModelFiles, config: RunConfig) -> list[float]:
    """The same steps by transformers' causal LM, PEFT's adapters and torch's AdamW, unpacked."""
    from transformers import AutoModelForCausalLM

    theirs: Any = AutoModelForCausalLM.from_pretrained(files.folder, dtype=torch.float32)
    _, ours = model_of(files, config)
    if config.method == "lora":
        theirs, trained = with_peft(theirs, config, ours)
    else:
        theirs.requires_grad_(True)
        trained = list(theirs.parameters())
    train, store = config.train, example_store(EXAMPLES)
    groups = [
        {"params": [p], "weight_decay": train.weight_decay if p.ndim > 1 else 0.0} for p in trained
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    order = SftOrder(store.lengths, config)
    losses = []
    for step in range(train.steps or 0):
        examples = [store[i] for batch in order.batches(step) for row in batch for i in row]
        labels = sum(len(e) - e.prompt for e in examples)
        total = 0.0
        for example in examples:
            ids = torch.tensor([example.input_ids])
            logits = theirs(ids).logits[0, example.prompt - 1 : -1]
            loss = nn.functional.cross_entropy(logits, ids[0, example.prompt :], reduction="sum")
            torch.autograd.backward(loss / labels)
            total += loss.item() / labels
        warm, rest = min(1.0, step / 2), (6 - step) / 4
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate * (warm if step < 2 else rest)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def with_peft(
    theirs: Any, config: RunConfig, ours: dict[str, nn.Parameter]
) -> tuple[Any, list[nn.Parameter]]:
    peft = pytest.importorskip("peft")
    lora = config.lora
    adapted = peft.get_peft_model(
        theirs,
        peft.LoraConfig(
            r=lora.r, lora_alpha=lora.alpha, target_modules=list(lora.modules),
            layers_to_transform=[0, 1, 2],
        ),
    )  # fmt: skip
    named = dict(adapted.named_parameters())
    trained = []
    for name, tensor in ours.items():
        theirs_name = f"base_model.model.model.{name.removesuffix('.weight')}.default.weight"
        named[theirs_name].data.copy_(tensor.detach())
        trained.append(named[theirs_name])
    return adapted, trained


@pytest.mark.parametrize("method", ["lora", "full"])
def test_losses_are_transformers(files: ModelFiles, method: str) -> None:
    config = config_of(method, train={"learning_rate": 1e-3} if method == "full" else {})
    trainer, steps = trainer_of(files, config)
    trainer.run()
    assert [s.loss for s in steps] == pytest.approx(by_transformers(files, config), abs=1e-5)
    assert steps[-1].loss < steps[0].loss


@pytest.mark.parametrize("method", ["lora", "full"])
def test_accumulation_changes_nothing(files: ModelFiles, method: str) -> None:
    ends = []
    for batch_size, accumulate in ((8, 1), (1, 8), (2, 4)):
        train = {"batch_size": batch_size, "accumulate": accumulate, "learning_rate": 1e-3}
        config = config_of(method, train=train, sft={"context": 32, "packing": False})
        trainer, steps = trainer_of(files, config)
        trainer.run()
        ends.append((trainer.state()[0], [s.loss for s in steps]))
    for tensors, losses in ends[1:]:
        assert losses == pytest.approx(ends[0][1], abs=1e-5)
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, ends[0][0][name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    "config",
    [
        config_of(lora={"dropout": 0.3}),
        config_of("full"),
        config_of("full", train={"in_backward": True}),
        config_of("full", train={"rounding": "stochastic"}),
    ],
    ids=["dropout", "full", "in-backward", "stochastic"],
)
def test_going_on_is_bit_for_bit(files: ModelFiles, config: RunConfig) -> None:
    whole, steps = trainer_of(files, config, validate=True)
    whole.run()
    half, _ = trainer_of(files, config, validate=True)
    half.run(until=lambda: half.step == 3)
    resumed, rest = trainer_of(files, config, validate=True)
    resumed.restore(half.step, *half.state(), half.notes())
    resumed.run()
    assert [(s.step, s.loss) for s in rest] == [(s.step, s.loss) for s in steps[3:]]
    assert resumed.best == whole.best
    for name, tensor in whole.state()[0].items():
        assert torch.equal(tensor, resumed.state()[0][name]), name


def test_updates_in_the_backward_pass_are_one_a_step(files: ModelFiles) -> None:
    """Several rows are one pack, and that has one backward pass."""
    trainer, _ = trainer_of(files, config_of("full", train={"in_backward": True, "batch_size": 3}))
    trainer.run()
    counts = {name: int(v) for name, v in trainer.state()[1].items() if name.endswith("/step")}
    assert len(counts) == len(trainer.state()[0])
    assert set(counts.values()) == {6}


def test_loss_on_unseen_articles_is_measured(files: ModelFiles) -> None:
    trainer, steps = trainer_of(files, config_of(), validate=True)
    bests: list[tuple[int, float]] = []
    trainer.on_best = lambda: bests.append((trainer.step, trainer.best.loss))
    trainer.run()
    measured = {s.step: s.figures["validation_loss"] for s in steps if s.figures}
    assert list(measured) == [2, 4, 6]
    assert bests[-1] == (trainer.best.step, min(measured.values()))
    assert trainer.best.before > trainer.best.loss
    model = trainer.model
    labels = sum(len(e) - e.prompt for e in EXAMPLES[:3])
    with torch.no_grad():
        by_hand = sum(float(model.loss(trainer.engine.pack([[i]]))) for i in range(3)) / labels
    assert measured[6] == pytest.approx(by_hand, rel=1e-6)
    # a line of metrics.jsonl has the figure where it was measured alone
    assert "validation_loss" in steps[1].to_json()
    assert "validation_loss" not in steps[0].to_json()


def test_training_stops_when_unseen_articles_gain_no_more(files: ModelFiles) -> None:
    config = config_of(
        train={"steps": 40, "learning_rate": 3.0}, sft={"evaluate_steps": 1, "patience": 3}
    )
    trainer, steps = trainer_of(files, config, validate=True)
    trainer.run()
    assert trainer.stopped_early
    assert len(steps) == trainer.best.step + 3 < 40
    # a resumed run stays stopped
    resumed, more = trainer_of(files, config, validate=True)
    resumed.restore(trainer.step, *trainer.state(), trainer.notes())
    resumed.run()
    assert more == []


def test_joint_training_adds_the_alignment_loss(files: ModelFiles) -> None:
    pairs = PairList(("sw", "en"), ("maji", "moto", "mti"), ("water", "fire", "tree"))
    config = config_of(objective="joint", sft={"context": 32, "align_pairs": 3}, align={"layer": 2})
    (split,) = tokenize_splits({"train": pairs}, files.tokenizer, config.words)
    empty = torch.empty(0)
    joint = Pairs(split, fit_space("raw", empty, empty))
    trainer, steps = trainer_of(files, config, joint)
    trainer.run()
    for step in steps:
        assert step.figures.keys() == {"align_loss", "cosine_true", "cosine_random"}
        assert all(map(math.isfinite, step.figures.values()))
    alone, others = trainer_of(files, config_of())
    alone.run()
    # the same articles, so the same first loss; another gradient
    assert steps[0].loss == pytest.approx(others[0].loss, rel=1e-6)
    assert steps[0].grad_norm != pytest.approx(others[0].grad_norm, rel=1e-3)
    assert trainer.replay([s.to_json() for s in steps]) == []


def test_a_gradient_of_the_alignment_loss_is_its_weight(files: ModelFiles) -> None:
    """The gradient of the sum: twice the weight adds the alignment's part once more."""
    pairs = PairList(("sw", "en"), ("maji", "moto"), ("water", "fire"))
    gradients: list[dict[str, Tensor]] = []
    for weight in (1e-9, 1.0, 2.0):
        sft = {"context": 32, "align_pairs": 2, "align_weight": weight}
        config = config_of(objective="joint", sft=sft, align={"layer": 2})
        (split,) = tokenize_splits({"train": pairs}, files.tokenizer, config.words)
        empty = torch.empty(0)
        trainer, _ = trainer_of(files, config, Pairs(split, fit_space("raw", empty, empty)))
        found: dict[str, Tensor] = {}
        gradients.append(found)
        engine = trainer.engine
        engine.updates.step = lambda engine=engine, found=found: found.update(  # type: ignore[method-assign,misc]
            {n: t.grad.clone() for n, t in engine.tensors.items() if t.grad is not None}
        )
        engine.run(0)
    none, once, twice = gradients
    moved = 0
    for name in once:
        torch.testing.assert_close(
            twice[name] - none[name], 2 * (once[name] - none[name]), rtol=1e-3, atol=1e-5
        )
        moved += not torch.allclose(once[name], none[name])
    assert moved > 0


def damaged(trainer: SftTrainer) -> None:
    # another tensor: the file's own memory stays as it is
    trainer.model.head.data = torch.full_like(trainer.model.head, math.nan)


def full(trainer: SftTrainer) -> None:
    def run(step: int, ahead: bool) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")

    trainer.engine.run = run  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damaged, "gradient of .* is not finite"),
        (
            full,
            r"out of memory on cpu: .* Tried to allocate 2.00 GiB; held .* weights .* optimizer",
        ),
    ],
    ids=["nan", "no-memory"],
)
def test_what_ends_a_run_is_said(
    files: ModelFiles, spoil: Callable[[SftTrainer], None], message: str
) -> None:
    trainer, _ = trainer_of(files, config_of())
    spoil(trainer)
    with pytest.raises(TrainingError, match=message):
        trainer.run()


def test_a_loss_that_becomes_nan_ends_the_run(files: ModelFiles) -> None:
    trainer, steps = trainer_of(files, config_of())
    trainer.on_step = lambda step: damaged(trainer)
    with pytest.raises(TrainingError, match="step 2: loss nan"):
        trainer.run()
    assert steps == []


def test_an_example_without_a_label_is_refused(files: ModelFiles, tmp_path: Path) -> None:
    trainer, _ = trainer_of(files, config_of())
    bare = replace(EXAMPLES[0], prompt=len(EXAMPLES[0]))
    trainer.engine._examples = example_store([bare] * len(EXAMPLES))
    with pytest.raises(ValueError, match=r"none of the .* tokens of a row is a label"):
        trainer.run()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_fused_blocks_give_the_modules_losses(files: ModelFiles, method: str) -> None:
    train = {"learning_rate": 1e-3}
    plain, expected = trainer_of(files, config_of(method, train=train))
    plain.run()
    config = config_of(method, train=train | {"engine": "fused"})
    model, _ = model_of(files, config)
    fuse_for_texts(model, config)
    assert model.early.fused is not None
    store, steps = example_store(EXAMPLES), []
    order = SftOrder(store.lengths, config)
    engine = SftStep(model, model.trainable(), store, order, config, None)
    SftTrainer(config, model, engine, order, None, steps.append).run()
    losses = [s.loss for s in expected]
    assert [s.loss for s in steps] == pytest.approx(losses, abs=1e-4)
    # the model's own tensors follow the joined ones
    ours, theirs = model.weights(), plain.model.weights()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4)


def test_an_attention_that_cannot_run_is_refused(files: ModelFiles) -> None:
    config = config_of(sft={"attention": "varlen"})
    model, _ = model_of(files, config)
    with pytest.raises(UserError, match=r"sft\.attention: varlen needs train\.engine: fused"):
        fuse_for_texts(model, config)
