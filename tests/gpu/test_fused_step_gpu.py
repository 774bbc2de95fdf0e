"""The fused step on a GPU: graphs give the bits of single launches, and the modules' steps."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.block_gradients import Trained, assert_gradients_err_no_more
from tli_engine import backends
from tli_engine.config import RunConfig
from tli_engine.data.pairs import PairList
from tli_engine.data.splits import Split
from tli_engine.data.words import pack
from tli_engine.errors import TrainingError
from tli_engine.models.adapters import add_lora, add_transposed_copies
from tli_engine.models.early import EarlyModel, load_early
from tli_engine.models.files import ModelFiles, open_model
from tli_engine.testing import assert_within_error_budget, random_words, save_tiny_model
from tli_engine.train.fused_step import FusedStep
from tli_engine.train.loop import StepMetrics, Trainer
from tli_engine.train.prepare import fit_loss_space

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PAIRS = 40
FAMILIES = ["llama", "qwen2", "qwen3", "gemma3_text"]
FIELDS = ("loss", "lr", "grad_norm", "cosine_true", "cosine_random")
Start = Callable[..., tuple[Trainer, list[StepMetrics]]]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Models of widths that the kernels take, by family."""
    made: dict[str, Path] = {}

    def find(family: str) -> Path:
        if family not in made:
            sizes = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64}
            made[family] = save_tiny_model(tmp_path_factory.mktemp(family), family, **sizes)
        return made[family]

    return find


def load(files: ModelFiles, config: RunConfig) -> EarlyModel:
    return load_early(
        files,
        config.align.layer,
        dtype=getattr(torch, config.dtype),
        device=torch.device(config.device),
        quantize=config.quantize,
        numerics=config.numerics,
        weight_residency=config.weight_residency,
    )


def words_as_pairs() -> Split:
    words = random_words(2 * PAIRS, 6, seed=3)
    names = tuple(str(i if i % 5 else 0) for i in range(PAIRS))
    source = [words[int(name)] for name in names]
    pairs = PairList(("sw", "en"), names, tuple(f"t{i}" for i in range(PAIRS)))
    return Split("train", pairs, source, words[PAIRS:])


@pytest.fixture
def start(folders: Callable[[str], Path]) -> Start:
    def begin(family: str = "llama", **sections: Any) -> tuple[Trainer, list[StepMetrics]]:
        values: dict[str, Any] = {
            "device": "cuda",
            "dtype": "bfloat16",
            "quantize": "nf4",
            "model": str(folders(family)),
            "lora": {"layers": "0-1", "modules": ["q_proj", "v_proj"], "r": 8},
            "align": {"layer": 2, "loss": "triplet-hardest"},
            "train": {"steps": 16, "batch_size": 7, "learning_rate": 1e-3},
        }
        for name, section in sections.items():
            values[name] = values[name] | section if isinstance(section, dict) else section
        config = RunConfig.model_validate(values)
        model = load(open_model(config.model), config)
        pairs = words_as_pairs()
        space = fit_loss_space(model, pairs, config)
        add_lora(model, config.lora, config.align.layer, seed=0)
        if config.train.engine != "modules":
            assert model.fuse_on_gpu() is None
        add_transposed_copies(model)
        steps: list[StepMetrics] = []
        return Trainer(model, config, pairs, space, steps.append), steps

    return begin


def tensors_of(trainer: Trainer) -> dict[str, Tensor]:
    adapter, statistics = trainer.state()
    return {n: t.clone() for n, t in (adapter | statistics).items()}


CASES = [
    pytest.param({}, id="triplet"),
    pytest.param({"align": {"loss": "infonce"}}, id="infonce"),
    pytest.param({"numerics": "fast"}, id="fast"),
    pytest.param({"weight_residency": "bf16"}, id="bf16"),
    pytest.param({"quantize": "none"}, id="dense"),
    pytest.param({"lora": {"dropout": 0.1}}, id="dropout"),
    pytest.param({"lora": {"layers": "1", "modules": ["q_proj", "down_proj"]}}, id="upper"),
    pytest.param({"train": {"max_grad_norm": 0.1}}, id="clipped"),
]


# of one family each: they differ from the others in what the graph holds of the loss, or of the blocks
ONCE = [
    pytest.param({}, "mistral", id="triplet-mistral"),
    pytest.param({"align": {"space": "centred"}}, "llama", id="centred-llama"),
    pytest.param({"align": {"pooling": "weighted"}}, "llama", id="weighted-llama"),
    pytest.param(
        {"align": {"space": "centred", "pooling": "last", "loss": "infonce"}}, "mistral",
        id="centred-last-mistral",
    ),
]  # fmt: skip
GRAPHED = [
    pytest.param(*case.values, family, id=f"{case.id}-{family}")
    for case in CASES
    for family in FAMILIES
] + ONCE


@pytest.mark.parametrize(("sections", "family"), GRAPHED)
def test_graphs_give_the_bits_of_single_launches(
    sections: dict[str, Any], family: str, start: Start
) -> None:
    graphed, steps = start(family, **sections)
    train = sections.get("train", {}) | {"cuda_graph": False}
    eager, expected = start(family, **(sections | {"train": train}))
    graphed.run()
    eager.run()
    assert isinstance(graphed.engine, FusedStep)
    assert all(shape.graph is not None for shape in graphed.engine._shapes.values())
    for one, other in zip(steps, expected, strict=True):
        assert [getattr(one, f) for f in FIELDS] == [getattr(other, f) for f in FIELDS]
    ours, theirs = tensors_of(graphed), tensors_of(eager)
    assert all(torch.equal(t, theirs[n]) for n, t in ours.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_err_no_more_than_the_modules(
    family: str, folders: Callable[[str], Path]
) -> None:
    files, cuda = open_model(str(folders(family))), torch.device("cuda")
    words = pack(random_words(60, 7)).to(cuda)
    hidden = {}
    for name, dtype in (
        ("exact", torch.float32),
        ("modules", torch.bfloat16),
        ("fused", torch.bfloat16),
    ):
        # the values that bf16 holds
        model = load_early(files, 3, dtype=torch.bfloat16, device=cuda, quantize="none").to(dtype)
        if name == "fused":
            assert model.fuse_on_gpu() is None
        with torch.no_grad():
            hidden[name] = model(words, 3)
    exact = hidden["exact"].double()
    assert_within_error_budget(hidden["fused"], hidden["modules"], exact, factor=3)


@pytest.mark.parametrize(
    ("trained", "quantize"), [("adapters", "none"), ("adapters", "nf4"), ("weights", "none")]
)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_gradients_err_no_more_than_the_modules(
    family: str, trained: Trained, quantize: str, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64}
    # weights that do not blow up what is rounded on the way
    files = open_model(str(save_tiny_model(tmp_path, family, **sizes, initializer_range=0.07)))
    cuda = torch.device("cuda")
    assert_gradients_err_no_more(files, trained, quantize, device=cuda, factor=2)


def test_steps_are_those_of_the_modules_in_fp32(start: Start) -> None:
    for quantize in ("none", "nf4"):
        values = {"dtype": "float32", "quantize": quantize}
        fused, steps = start(**values)
        plain, expected = start(**values, train={"engine": "modules"})
        fused.run()
        plain.run()
        for one, other in zip(steps, expected, strict=True):
            for name in FIELDS:
                expected_value = pytest.approx(getattr(other, name), rel=5e-3, abs=1e-4)
                assert getattr(one, name) == expected_value, (quantize, one.step, name)


def test_resumes_bit_for_bit(start: Start) -> None:
    whole, expected = start(lora={"dropout": 0.1})
    whole.run()
    first, _ = start(lora={"dropout": 0.1})
    first.run(until=lambda: first.step == 5)
    resumed, steps = start(lora={"dropout": 0.1})
    resumed.restore(5, *first.state())
    resumed.run()
    assert [s.loss for s in steps] == [s.loss for s in expected[5:]]
    ours, theirs = tensors_of(resumed), tensors_of(whole)
    assert all(torch.equal(t, theirs[n]) for n, t in ours.items())


def test_a_step_that_is_not_finite_is_skipped_and_stops_the_run(start: Start) -> None:
    trainer, steps = start(train={"steps": 200})
    trainer.run(until=lambda: trainer.step == 3)
    before = tensors_of(trainer)
    assert isinstance(trainer.engine, FusedStep)
    trainer.engine._inputs.fill_(math.nan)
    with pytest.raises(TrainingError, match=r"step 4: loss nan, .*lower train\.learning_rate"):
        trainer.run()
    assert [s.step for s in steps] == [1, 2, 3]
    assert all(torch.equal(t, before[n]) for n, t in tensors_of(trainer).items())


@pytest.mark.parametrize("most", [16, 40])
def test_a_batch_in_parts_has_the_same_gradient(most: int, start: Start) -> None:
    values: dict[str, Any] = {"dtype": "float32", "align": {"loss": "infonce"}}
    whole, expected = start(**values)
    parts, steps = start(**values, train={"chunk_tokens": most})
    whole.run()
    parts.run()
    for one, other in zip(steps, expected, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-3)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=5e-3)


def test_nothing_waits_for_the_device_in_a_step(start: Start) -> None:
    trainer, _ = start()
    trainer.run(until=lambda: trainer.step == 12)
    trainer.model.train()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.engine.launch(0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(list(trainer.engine.collect(wait=True))) == 1


def test_every_op_of_the_step_runs_on_its_kernel() -> None:
    for op in ("add_rms_norm", "swiglu", "word_attention", "pooled_alignment_loss", "flat_adamw"):
        assert backends.explain(op) == ("triton", ())
