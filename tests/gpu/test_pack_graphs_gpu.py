"""Fine-tuning steps from CUDA graphs: the bits of the same launches one by one, without waiting."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tli_engine.config import RunConfig
from tli_engine.data.examples import Example, ExampleStore
from tli_engine.errors import TrainingError
from tli_engine.models.adapters import add_lora
from tli_engine.models.causal import load_causal
from tli_engine.models.files import ModelFiles, open_model
from tli_engine.testing import example_store, save_tiny_model
from tli_engine.train.pack_graphs import PackGraphs
from tli_engine.train.sft_loop import SftMetrics, SftTrainer
from tli_engine.train.sft_order import SftOrder
from tli_engine.train.sft_prepare import fuse_for_texts
from tli_engine.train.sft_step import SftStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64,
    "max_position_embeddings": 512, "initializer_range": 0.05,
}  # fmt: skip
CONTEXT, STEPS = 256, 8
CUDA = torch.device("cuda")
Open = Callable[[str], ModelFiles]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Open:
    made: dict[str, ModelFiles] = {}

    def find(family: str) -> ModelFiles:
        if family not in made:
            window = {"sliding_window": 48} if family == "gemma3_text" else {}
            folder: Path = tmp_path_factory.mktemp("models") / family
            made[family] = open_model(str(save_tiny_model(folder, family, **SIZES, **window)))
        return made[family]

    return find


def examples(*lengths: int) -> ExampleStore:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]
    return example_store([Example(tuple(i), len(i) // 2) for i in ids])


# within one tile of keys: the gradient of longer ones' queries is added up in any order
SHORT = examples(*[20 + 11 * i % 45 for i in range(40)])


def config_of(method: str = "lora", **changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "model": "m", "objective": "sft", "method": method, "data": "a.jsonl",
        "lora": {"layers": "0-2", "modules": ("q_proj", "v_proj", "down_proj"), "r": 8},
        "sft": {"context": CONTEXT},
        "train": {"steps": STEPS, "batch_size": 1, "learning_rate": 1e-3, "cuda_graph": True},
    }  # fmt: skip
    for section, change in changes.items():
        values[section] = values.get(section, {}) | change if isinstance(change, dict) else change
    return RunConfig.model_validate(values)


def trainer_of(
    files: ModelFiles,
    config: RunConfig,
    store: ExampleStore = SHORT,
    dtype: torch.dtype = torch.bfloat16,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[SftTrainer, list[SftMetrics]]:
    options: dict[str, Any] = {"dtype": dtype, "device": CUDA, "quantize": config.quantize}
    model = load_causal(files, **options)
    if config.method == "full":
        model.train_all()
    else:
        add_lora(model.early, config.lora, model.early.depth, config.seed)
    fuse_for_texts(model, config)
    steps: list[SftMetrics] = []
    order = SftOrder(store.lengths, config)
    engine = SftStep(model, model.trainable(), store, order, config, None, say)
    return SftTrainer(config, model, engine, order, None, steps.append), steps


def run(trainer: SftTrainer, steps: list[SftMetrics]) -> tuple[list[float], dict[str, Tensor]]:
    trainer.run()
    return [s.loss for s in steps], {n: t.detach() for n, t in trainer.engine.tensors.items()}


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", config_of()),
        ("llama", config_of("full")),
        ("llama", config_of(lora={"dropout": 0.3})),
        ("llama", config_of(quantize="nf4", sft={"activations": "recompute"})),
        ("llama", config_of(quantize="nf4", lora={"dropout": 0.1}, sft={"activations": "auto"})),
        ("llama", config_of("full", train={"accumulate": 3, "max_grad_norm": 0.5})),
        ("llama", config_of("full", sft={"activations": "recompute"})),
        ("llama", config_of("full", train={"rounding": "stochastic"})),
        ("qwen2", config_of(train={"accumulate": 2})),
        ("gemma3_text", config_of(train={"learning_rate": 3e-2})),
    ],
    ids=[
        "lora", "full", "dropout", "nf4-recompute", "nf4-dropout", "accumulate", "full-recompute",
        "stochastic", "qwen2", "gemma",
    ],
)  # fmt: skip
def test_replays_are_the_launches(family: str, config: RunConfig, opened: Open) -> None:
    """Bit for bit, but for what attention's way back adds up in any order: two runs of launches show that."""
    found = []
    for record in (False, False, True):
        trainer, steps = trainer_of(opened(family), config)
        graphs = PackGraphs(trainer.model, CONTEXT, lambda line: None, record=record)
        trainer.engine.use_graphs(graphs)
        losses, tensors = run(trainer, steps)
        found.append(
            torch.cat(
                [torch.tensor(losses), *(t.float().cpu().flatten() for t in tensors.values())]
            )
        )
        assert (graphs.captured > 0) == record
        assert losses[-1] < losses[0]
    launched, again, replayed = found
    spread = (again - launched).norm()
    assert (replayed - launched).norm() <= 3 * spread


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("lengths", [(128, 40, 77, 200, 256, 90) * 4, (256,) * 24], ids=str)
def test_losses_are_those_of_packs_as_they_are(
    method: str, lengths: tuple[int, ...], opened: Open
) -> None:
    """Other sizes of products, and other orders of sums; packs of one length attend as a batch."""
    losses, store = {}, examples(*lengths)
    for setting in (False, True):
        # so many rows that the embeddings' gradient is sorted first
        rows = 16 if len(set(lengths)) == 1 else 1
        config = config_of(method, train={"cuda_graph": setting, "batch_size": rows})
        trainer, steps = trainer_of(opened("llama"), config, store)
        losses[setting], _ = run(trainer, steps)
        graphs = trainer.engine.graphs
        assert (graphs is not None and graphs.captured > 0) == setting
    assert losses[True] == pytest.approx(losses[False], abs=3e-2)
    assert losses[True][0] == pytest.approx(losses[False][0], abs=5e-3)


def test_a_replay_waits_for_nothing(opened: Open) -> None:
    trainer, _ = trainer_of(opened("llama"), config_of(lora={"dropout": 0.1}))
    trainer.model.train()
    graphs = trainer.engine.graphs
    assert graphs is not None
    pack = trainer.engine.pack([[0, 1, 2, 3]])
    for _ in range(2):
        graphs.add(pack, pack.labels)
    assert graphs.captured == 1
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            graphs.add(pack, pack.labels)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_going_on_gives_the_same_losses(method: str, opened: Open) -> None:
    config = config_of(method, lora={"dropout": 0.1})
    whole, steps = trainer_of(opened("llama"), config)
    whole.run()
    half, _ = trainer_of(opened("llama"), config)
    half.run(until=lambda: half.step == 5)
    resumed, rest = trainer_of(opened("llama"), config)
    resumed.restore(half.step, *half.state(), half.notes())
    resumed.run()
    assert [s.loss for s in rest] == pytest.approx([s.loss for s in steps[5:]], abs=5e-3)


def test_a_loss_that_is_no_number_ends_the_run(opened: Open) -> None:
    trainer, steps = trainer_of(opened("llama"), config_of())

    @torch.no_grad()
    def damage(metrics: SftMetrics) -> None:
        steps.append(metrics)
        if metrics.step == 5:
            # where it lies: a graph reads it
            trainer.model.head.fill_(torch.nan)

    trainer.on_step = damage
    # the gradients of step 6 were begun before
    with pytest.raises(TrainingError, match="step 7: loss nan"):
        trainer.run()
    assert len(steps) == 6


def test_what_cannot_be_captured_is_launched_and_said(opened: Open) -> None:
    said: list[str] = []
    trainer, steps = trainer_of(opened("llama"), config_of(), dtype=torch.float32, say=said.append)
    assert trainer.engine.graphs is None
    trainer.run()
    assert len(steps) == STEPS
    (line,) = said
    assert "train.cuda_graph: a step's kernels are launched one by one: sdpa asks" in line


def test_activations_of_several_shapes_are_held_once(opened: Open) -> None:
    """Those of a graph, and those of what is launched since its shape is new, or one too many."""
    store = examples(*(512,) * 16, 300)
    config = config_of("full", sft={"context": 512}, train={"batch_size": 16})
    trainer, _ = trainer_of(opened("llama"), config, store)
    trainer.model.train()
    graphs = trainer.engine.graphs
    assert graphs is not None
    texts = list(range(16))
    packs = [trainer.engine.pack([some]) for some in (texts, texts[1:], [*texts[1:], 16])]
    before, taken = torch.cuda.memory_reserved(), []
    torch.cuda.reset_peak_memory_stats()
    for pack in packs:
        for _ in range(2):
            graphs.add(pack, pack.labels)
        taken.append(torch.cuda.max_memory_reserved() - before)
    assert graphs.captured == len(packs)
    # of 8,192 tokens, then of fewer
    assert taken[0] > 100 << 20
    assert taken[-1] <= 1.25 * taken[0]
