"""The fused step is the modules' step: losses, statistics, checkpoints; on a CPU without graphs."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tli_engine.align import objective
from tli_engine.align.encode import encode
from tli_engine.align.pooling import pooling_weight
from tli_engine.align.space import fit_space
from tli_engine.config import RunConfig
from tli_engine.data.pairs import PairList
from tli_engine.data.splits import Split
from tli_engine.data.words import pack
from tli_engine.errors import TrainingError, UserError
from tli_engine.models.adapters import adapter_tensors, add_lora
from tli_engine.models.early import load_early
from tli_engine.models.files import open_model
from tli_engine.models.projection import NotFusedError
from tli_engine.ops import pooled_alignment_loss
from tli_engine.testing import random_words, save_tiny_model
from tli_engine.train.checkpoint import load_checkpoint, save_checkpoint
from tli_engine.train.fused_step import FusedStep
from tli_engine.train.loop import StepMetrics, Trainer
from tli_engine.train.module_step import ModuleStep
from tli_engine.train.staging import BatchBuffer, WordTable, padded

PAIRS = 22
Start = Callable[..., tuple[Trainer, list[StepMetrics]]]


def pairs_of_words() -> Split:
    """Pairs of which some share a source."""
    words = random_words(2 * PAIRS, 6, seed=3)
    source = [words[i if i % 5 else 0] for i in range(PAIRS)]
    names = [str(i if i % 5 else 0) for i in range(PAIRS)]
    target = words[PAIRS:]
    pairs = PairList(("sw", "en"), tuple(names), tuple(f"t{i}" for i in range(PAIRS)))
    return Split("train", pairs, source, target)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    return save_tiny_model(tmp_path_factory.mktemp("fused"), "llama", **sizes)


@pytest.fixture
def start(folder: Path) -> Start:
    def begin(engine: str, **sections: Any) -> tuple[Trainer, list[StepMetrics]]:
        values: dict[str, Any] = {
            "model": str(folder),
            "quantize": sections.pop("quantize", "none"),
            "lora": {"layers": "0-1", "modules": ["q_proj", "v_proj", "down_proj"], "r": 4},
            "align": {"layer": 3, "loss": "triplet-hardest"},
            "train": {"steps": 12, "batch_size": 6, "learning_rate": 1e-2, "engine": engine},
        }
        for name, section in sections.items():
            values[name] = values[name] | section
        config = RunConfig.model_validate(values)
        cpu = torch.device("cpu")
        files = open_model(config.model)
        model = load_early(
            files, config.align.layer, dtype=torch.float32, device=cpu, quantize=config.quantize
        )
        pairs = pairs_of_words()
        vectors = [
            encode(model, list(dict.fromkeys(words)), [config.align.layer], config.align.pooling)[0]
            for words in (pairs.source, pairs.target)
        ]
        space = fit_space(config.align.space, *vectors).to(torch.float32)
        add_lora(model, config.lora, config.align.layer, seed=0)
        steps: list[StepMetrics] = []
        return Trainer(model, config, pairs, space, steps.append), steps

    return begin


def tensors_of(trainer: Trainer) -> dict[str, Tensor]:
    adapter, statistics = trainer.state()
    return {n: t.clone() for n, t in (adapter | statistics).items()}


CASES = [
    pytest.param({}, id="triplet"),
    pytest.param({"align": {"loss": "infonce", "pooling": "paper"}}, id="infonce-paper"),
    pytest.param({"align": {"space": "whitened", "loss": "infonce"}}, id="whitened"),
    pytest.param({"align": {"space": "centred", "mask_duplicates": False}}, id="centred"),
    pytest.param({"align": {"layer": 4, "two_way": False}}, id="final-norm"),
    pytest.param({"lora": {"layers": "1-2"}}, id="second-block-first"),
    pytest.param({"quantize": "nf4"}, id="nf4"),
    pytest.param({"train": {"max_grad_norm": 0.05, "warmup_steps": 4}}, id="clipped"),
    pytest.param({"lora": {"modules": ["gate_proj", "o_proj"]}}, id="other-modules"),
]


@pytest.mark.parametrize("sections", CASES)
def test_steps_are_those_of_the_modules(sections: dict[str, Any], start: Start) -> None:
    plain, expected = start("modules", **sections)
    fused, steps = start("fused", **sections)
    assert isinstance(plain.engine, ModuleStep)
    assert isinstance(fused.engine, FusedStep)
    plain.run()
    fused.run()
    for one, other in zip(steps, expected, strict=True):
        assert one.step == other.step
        for key in ("loss", "lr", "grad_norm", "cosine_true", "cosine_random"):
            assert getattr(one, key) == pytest.approx(getattr(other, key), rel=2e-4, abs=2e-6), key
    ours, theirs = tensors_of(fused), tensors_of(plain)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).norm() <= 5e-3 * theirs[name].norm() + 1e-6, name


@pytest.mark.parametrize("train", [{}, {"chunk_tokens": 9}], ids=["whole", "parts"])
@pytest.mark.parametrize("space", ["raw", "centred", "whitened"])
def test_all_pairs_are_compared_by_the_op_that_holds_no_matrix(
    space: str, train: dict[str, Any], start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[bool] = []

    def count(hidden: Tensor, *args: Any, **choice: Any) -> Any:
        compared.append(hidden.requires_grad)
        return pooled_alignment_loss(hidden, *args, **choice)

    trainer, _ = start("fused", align={"space": space}, train=train)
    monkeypatch.setattr(objective, "pooled_alignment_loss", count)
    monkeypatch.delattr(objective, "cosine_similarity")
    trainer.engine.launch(0)
    # once more for the raw cosines, without a gradient
    assert compared == ([True] if space == "raw" else [True, False])


def test_what_is_trained_is_what_is_saved(start: Start) -> None:
    trainer, _ = start("fused")
    before = {n: t.detach().clone() for n, t in adapter_tensors(trainer.model).items()}
    trainer.run()
    after = adapter_tensors(trainer.model)
    assert after.keys() == before.keys() == trainer.engine.tensors.keys()
    assert all(not torch.equal(t, before[n]) for n, t in after.items() if ".lora_B." in n)


@pytest.mark.parametrize("engine", ["fused", "modules"])
def test_resumes_bit_for_bit_and_from_the_other_engine_too(
    engine: str, start: Start, tmp_path: Path
) -> None:
    whole, expected = start("fused")
    whole.run()
    first, _ = start(engine)
    first.run(until=lambda: first.step == 5)
    resumed, steps = start("fused")
    load_checkpoint(save_checkpoint(tmp_path, first, keep=1), resumed)
    resumed.run()
    assert [s.step for s in steps] == list(range(6, 13))
    exact = engine == "fused"
    for one, other in zip(steps, expected[5:], strict=True):
        assert one.loss == (other.loss if exact else pytest.approx(other.loss, rel=1e-3))
    if exact:
        ours, theirs = tensors_of(resumed), tensors_of(whole)
        assert all(torch.equal(t, theirs[n]) for n, t in ours.items())


def test_statistics_of_other_adapters_are_refused(start: Start) -> None:
    trainer, _ = start("fused")
    trainer.run(until=lambda: trainer.step == 2)
    adapter, statistics = trainer.state()
    name = next(n for n in statistics if n.endswith("exp_avg"))
    with pytest.raises(KeyError, match="extra"):
        trainer.restore(2, adapter, statistics | {"extra/exp_avg": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="exp_avg must be"):
        trainer.restore(2, adapter, statistics | {name: torch.zeros(3)})


def test_dropout_repeats_with_the_seed_and_differs_between_steps(start: Start) -> None:
    lora = {"dropout": 0.5}
    runs = [start("fused", lora=lora, quantize="nf4") for _ in range(2)]
    other, _ = start("fused", lora=lora, quantize="nf4")
    other = dataclasses.replace(other, config=other.config.model_copy(update={"seed": 7}))
    for trainer, _ in runs:
        trainer.run()
    other.run()
    (one, steps), (two, again) = runs
    assert [s.loss for s in steps] == [s.loss for s in again]
    assert all(torch.equal(t, tensors_of(two)[n]) for n, t in tensors_of(one).items())
    assert any(not torch.equal(t, tensors_of(other)[n]) for n, t in tensors_of(one).items())


@pytest.mark.parametrize("space", ["raw", "whitened"])
def test_a_batch_in_parts_has_the_same_gradient(space: str, start: Start) -> None:
    align = {"space": space, "loss": "infonce"}
    whole, expected = start("fused", align=align)
    parts, steps = start("fused", align=align, train={"chunk_tokens": 9})
    whole.run()
    parts.run()
    for one, other in zip(steps, expected, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-3)


def test_parts_draw_masks_of_their_own(start: Start) -> None:
    trainer, steps = start("fused", lora={"dropout": 0.5}, train={"chunk_tokens": 9})
    again, repeated = start("fused", lora={"dropout": 0.5}, train={"chunk_tokens": 9})
    trainer.run()
    again.run()
    assert [s.loss for s in steps] == [s.loss for s in repeated]
    assert all(math.isfinite(s.loss) for s in steps)


def test_a_step_without_a_finite_norm_changes_nothing_and_stops_the_run(start: Start) -> None:
    trainer, steps = start("fused")
    trainer.run(until=lambda: trainer.step == 2)
    before = tensors_of(trainer)
    assert isinstance(trainer.engine, FusedStep)
    trainer.engine._inputs.fill_(math.nan)
    with pytest.raises(TrainingError, match=r"step 3: loss nan, .*lower train.learning_rate"):
        trainer.run()
    assert [s.step for s in steps] == [1, 2]
    assert all(torch.equal(t, before[n]) for n, t in tensors_of(trainer).items())
    assert not trainer.model.training


@pytest.mark.parametrize("layers", ["0-1", "1-2"])
def test_a_word_longer_than_the_window_is_refused(
    layers: str, start: Start, tmp_path: Path
) -> None:
    """Attention over a pack knows no window: without this the model would be another one."""
    folder = save_tiny_model(tmp_path, "mistral", sliding_window=6)
    files = open_model(str(folder))
    model = load_early(files, 3, dtype=torch.float32, device=torch.device("cpu"))
    trainer, _ = start("modules", lora={"layers": layers})
    add_lora(model, trainer.config.lora, 3, seed=0)
    model.fuse()
    with pytest.raises(UserError, match="a word of 7 tokens is longer than this model's attention"):
        dataclasses.replace(trainer, model=model)


def test_what_cannot_be_fused_says_why(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tli_engine.models.fused._MODEL_TYPES", ())
    with pytest.raises(NotFusedError, match="no fused blocks for model type 'llama'"):
        start("fused")


def test_batches_are_laid_out_as_a_pack_and_filled_up() -> None:
    words = random_words(9, 6)
    places = [[100 * i + j for j in range(len(word))] for i, word in enumerate(words)]
    table = WordTable(words, places, "weighted")
    chosen = np.array([4, 0, 7, 4])
    expected = pack([words[i] for i in chosen])
    tokens = len(expected.input_ids)
    buffer = BatchBuffer(tokens + 5, 2, 3, torch.device("cpu"))
    batch = buffer.fill()
    table.write(chosen, batch)
    buffer.send()
    sent = buffer.batch
    assert sent.rows[:tokens].tolist() == [p for i in chosen for p in places[i]]
    assert torch.equal(sent.positions[:tokens], expected.position_ids)
    assert torch.equal(sent.weight[:tokens], pooling_weight(expected, "weighted"))
    assert torch.equal(sent.offsets, expected.offsets)
    assert sent.bounds[:, tokens:].tolist() == [
        list(range(tokens, tokens + 5)), list(range(tokens + 1, tokens + 6)),
    ]  # fmt: skip
    assert not sent.weight[tokens:].any()
    first, last = sent.bounds[:, :tokens].tolist()
    assert first == [int(t) - int(p) for t, p in enumerate(expected.position_ids)]
    ends = expected.offsets[1:].tolist()
    assert last == [next(e for e in ends if e > t) for t in range(tokens)]


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 127, 128, 129, 1000, 4096, 5000])
def test_few_numbers_of_rows_occur(tokens: int) -> None:
    rows = padded(tokens)
    assert tokens <= rows < tokens + max(16, tokens / 16)
    assert rows % 16 == 0
    assert len({padded(t) for t in range(1, 4097)}) < 100
