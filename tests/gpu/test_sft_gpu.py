"""Fine-tuning on a GPU: the engine's ops learn what transformers' modules do, and go on exactly."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tli_engine.config import RunConfig
from tli_engine.data.examples import Example, ExampleStore
from tli_engine.models.adapters import add_lora
from tli_engine.models.causal import load_causal
from tli_engine.models.files import ModelFiles, open_model
from tli_engine.testing import example_store, save_tiny_model
from tli_engine.train.sft_loop import SftMetrics, SftTrainer
from tli_engine.train.sft_order import SftOrder
from tli_engine.train.sft_prepare import fuse_for_texts
from tli_engine.train.sft_step import SftStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
    "max_position_embeddings": 512, "initializer_range": 0.05,
}  # fmt: skip


def examples() -> ExampleStore:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 120, (24,), generator=generator).tolist()
    ids = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]
    return example_store([Example(tuple(i), len(i) // 2) for i in ids])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    folder: Path = tmp_path_factory.mktemp("models") / "llama"
    return open_model(str(save_tiny_model(folder, "llama", **SIZES)))


def trainer_of(files: ModelFiles, method: str, **train: Any) -> tuple[SftTrainer, list[SftMetrics]]:
    config = RunConfig.model_validate(
        {
            "model": "m", "objective": "sft", "method": method, "data": "a.jsonl",
            "lora": {"layers": "all", "modules": ("q_proj", "v_proj", "down_proj"), "r": 8},
            "sft": {"context": 256},
            "train": {"steps": 12, "batch_size": 1, "learning_rate": 1e-3} | train,
        }
    )  # fmt: skip
    model = load_causal(files, dtype=torch.bfloat16, device=torch.device("cuda"))
    if method == "full":
        model.train_all()
    else:
        add_lora(model.early, config.lora, model.early.depth, config.seed)
    fuse_for_texts(model, config)
    store, steps = examples(), []
    order = SftOrder(store.lengths, config)
    engine = SftStep(model, model.trainable(), store, order, config, None)
    return SftTrainer(config, model, engine, order, None, steps.append), steps


@pytest.mark.parametrize("method", ["lora", "full"])
def test_losses_are_those_of_the_modules(files: ModelFiles, method: str) -> None:
    losses = {}
    for engine in ("modules", "fused"):
        trainer, steps = trainer_of(files, method, engine=engine)
        assert (trainer.model.early.fused is None) == (engine == "modules")
        trainer.run()
        losses[engine] = [s.loss for s in steps]
    # bf16, two ways of rounding
    assert losses["fused"] == pytest.approx(losses["modules"], abs=3e-2)
    assert losses["fused"][-1] < losses["fused"][0]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit", "adamw-paged", "adamw-paged-8bit"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_going_on_gives_the_same_losses(files: ModelFiles, method: str, optimizer: str) -> None:
    if optimizer != "adamw":
        pytest.importorskip("bitsandbytes")
    whole, steps = trainer_of(files, method, optimizer=optimizer)
    whole.run()
    half, _ = trainer_of(files, method, optimizer=optimizer)
    half.run(until=lambda: half.step == 6)
    resumed, rest = trainer_of(files, method, optimizer=optimizer)
    resumed.restore(half.step, *half.state(), half.notes())
    resumed.run()
    # attention's way back adds in no fixed order
    assert [s.loss for s in rest] == pytest.approx([s.loss for s in steps[6:]], abs=2e-3)


@pytest.mark.parametrize("rounding", ["master", "stochastic"])
def test_updates_in_the_backward_pass_learn(files: ModelFiles, rounding: str) -> None:
    trainer, steps = trainer_of(files, "full", in_backward=True, rounding=rounding)
    trainer.run()
    assert steps[-1].loss < steps[0].loss
    assert all(p.grad is None for p in trainer.engine.tensors.values())


@pytest.mark.parametrize("engine", ["modules", "fused"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_steps_launched_ahead_are_those_launched_in_turn(
    files: ModelFiles, method: str, engine: str
) -> None:
    losses = []
    for ahead in (True, False):
        trainer, steps = trainer_of(files, method, engine=engine, cuda_graph=False)
        assert trainer.engine.graphs is None
        assert trainer.engine.runs_ahead
        trainer.engine.runs_ahead = ahead
        trainer.run()
        losses.append([s.loss for s in steps])
    # attention's way back adds in no fixed order
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
