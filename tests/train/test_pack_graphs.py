"""Steps from static buffers: the losses of steps without, and which packs get a graph."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import DistError

from tests.fake_graphs import FakeRecorder
from tli_engine.align.space import fit_space
from tli_engine.config import RunConfig
from tli_engine.data.examples import Example
from tli_engine.data.pairs import PairList
from tli_engine.data.splits import tokenize_splits
from tli_engine.errors import TrainingError
from tli_engine.models.adapters import adapters, add_lora
from tli_engine.models.causal import CausalModel, load_causal
from tli_engine.models.early import EarlyModel
from tli_engine.models.files import ModelFiles, open_model
from tli_engine.models.graph_recorder import GraphRecorder
from tli_engine.testing import example_store, save_tiny_model
from tli_engine.train import pack_graphs
from tli_engine.train.pack_graphs import PackGraphs, block_weights, captures, why_not_captured
from tli_engine.train.sft_loop import SftTrainer
from tli_engine.train.sft_order import SftOrder
from tli_engine.train.sft_prepare import fuse_for_texts
from tli_engine.train.sft_step import Pairs, SftObserved, SftStep

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = [(9, 5), (14, 8), (7, 6), (20, 3), (11, 10), (16, 9), (13, 4), (8, 1)]
EXAMPLES = [
    Example(
        tuple(torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)).tolist()), p
    )
    for n, p in LENGTHS
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    folder: Path = tmp_path_factory.mktemp("models") / "llama"
    return open_model(str(save_tiny_model(folder, "llama")))


def config_of(method: str = "lora", **changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "model": "m", "objective": "sft", "method": method, "data": "a.jsonl",
        "lora": {"layers": "0-2", "modules": ("q_proj", "down_proj"), "r": 4, "alpha": 8},
        "sft": {"context": 32},
        "train": {"steps": 6, "batch_size": 1, "learning_rate": 1e-3, "engine": "fused"},
    }  # fmt: skip
    for section, change in changes.items():
        values[section] = values.get(section, {}) | change if isinstance(change, dict) else change
    return RunConfig.model_validate(values)


def step_of(files: ModelFiles, config: RunConfig) -> tuple[CausalModel, SftStep]:
    model = load_causal(files, dtype=torch.float32, device=torch.device("cpu"))
    if config.method == "full":
        model.train_all()
    else:
        add_lora(model.early, config.lora, model.early.depth, config.seed)
    fuse_for_texts(model, config)
    model.train()
    pairs = None
    if config.objective == "joint":
        words = PairList(("sw", "en"), ("maji", "moto", "mti"), ("water", "fire", "tree"))
        (split,) = tokenize_splits({"train": words}, files.tokenizer, config.words)
        pairs = Pairs(split, fit_space("raw", torch.empty(0), torch.empty(0)))
    store = example_store(EXAMPLES)
    order = SftOrder(store.lengths, config)
    return model, SftStep(model, model.trainable(), store, order, config, pairs)


def run(step: SftStep, count: int = 6) -> list[SftObserved]:
    return [step.run(i) for i in range(count)]


JOINT = {
    "objective": "joint", "sft": {"context": 32, "align_pairs": 3}, "align": {"layer": 2},
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        config_of(),
        config_of("full"),
        config_of(lora={"dropout": 0.3}),
        config_of(train={"batch_size": 1, "accumulate": 3, "max_grad_norm": 0.1}),
        config_of("full", train={"accumulate": 2}, sft={"context": 32, "activations": "recompute"}),
        config_of(**JOINT),
        config_of("full", train={"rounding": "stochastic"}),
    ],
    ids=["lora", "full", "dropout", "accumulate", "full-recompute", "joint", "stochastic"],
)
def test_losses_are_those_of_packs_as_they_are(files: ModelFiles, config: RunConfig) -> None:
    plain = step_of(files, config)[1]
    model, static = step_of(files, config)
    static.use_graphs(PackGraphs(model, config.sft.context, lambda line: None, record=False))
    expected, found = run(plain), run(static)
    assert [s.tokens for s in found] == [s.tokens for s in expected]
    assert [s.labels for s in found] == [s.labels for s in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, abs=2e-5)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=2e-3)
        assert (ours.aligned is None) == (theirs.aligned is None) == (config.objective == "sft")
    for name, tensor in plain.tensors.items():
        torch.testing.assert_close(static.tensors[name], tensor, rtol=1e-3, atol=5e-5)
        assert static.tensors[name].grad is not None
        assert tensor.grad is None


def test_masks_differ_from_step_to_step_and_come_again_with_the_seed(files: ModelFiles) -> None:
    config = config_of(lora={"dropout": 0.5}, train={"learning_rate": 1e-30})
    config = config.model_copy(update={"train": config.train.model_copy(update={"steps": 20})})
    losses = []
    for _ in range(2):
        model, step = step_of(files, config)
        for adapter in adapters(model.early).values():
            adapter.lora_B.weight.data.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
        step.use_graphs(PackGraphs(model, 32, lambda line: None, record=False))
        rows = [row for i in range(4) for row in step._order.batches(i)]
        step._order.batches = lambda number, rows=rows: [rows[0]]  # type: ignore[method-assign,misc]
        losses.append([s.loss for s in run(step, 3)])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 3


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> list[FakeRecorder]:
    made: list[FakeRecorder] = []

    def make(device: torch.device) -> FakeRecorder:
        made.append(FakeRecorder(device))
        return made[-1]

    monkeypatch.setattr(pack_graphs, "GraphRecorder", make)
    assert GraphRecorder is not make
    return made


def test_a_shape_is_recorded_when_it_comes_again(
    files: ModelFiles, recorder: list[FakeRecorder]
) -> None:
    config = config_of(train={"accumulate": 2})
    plain = [s.loss for s in run(step_of(files, config)[1])]
    model, step = step_of(files, config)
    graphs = PackGraphs(model, 32, lambda line: None)
    step.use_graphs(graphs)
    addresses = []
    losses = []
    for i in range(6):
        losses.append(step.run(i).loss)
        grads = [t.grad for t in step.tensors.values()]
        addresses.append([g.data_ptr() for g in grads if g is not None])
    assert len(addresses[0]) == len(step.tensors)
    # no step is begun after the last
    assert all(t.grad is not None and not t.grad.any() for t in step.tensors.values())
    assert losses == pytest.approx(plain, abs=2e-5)
    # a graph knows where the gradients lie
    assert all(a == addresses[0] for a in addresses)
    (made,) = recorder
    packs = sum(len(step._order.batches(i)) for i in range(6))
    assert graphs.captured == len(made.graphs) >= 1
    assert made.launched + sum(g.replays for g in made.graphs) == packs
    assert made.launched == len(graphs._shapes)


def test_no_graph_knows_of_gradients_that_are_not_there(
    files: ModelFiles, recorder: list[FakeRecorder]
) -> None:
    model, step = step_of(files, config_of())
    graphs = PackGraphs(model, 32, lambda line: None)
    pack = step.pack([[0, 1]])
    for _ in range(3):
        graphs.add(pack, pack.labels)
        for tensor in step.tensors.values():
            tensor.grad = None
    assert recorder[0].launched == 3
    assert graphs.captured == 0


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            RuntimeError("operation not permitted when stream is capturing\nCompile with …"),
            TrainingError,
            r"cannot be captured \(operation not permitted when stream is capturing\); set",
        ),
        (torch.OutOfMemoryError("Tried to allocate"), torch.OutOfMemoryError, "Tried to allocate"),
        (DistError("connection closed"), DistError, "connection closed"),
    ],
    ids=["unknown", "no-memory", "lost-partner"],
)
def test_a_capture_that_fails_is_one_line(
    error: RuntimeError, kind: type[Exception], message: str, files: ModelFiles,
    recorder: list[FakeRecorder], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model, step = step_of(files, config_of())
    graphs = PackGraphs(model, 32, lambda line: None)
    pack = step.pack([[0, 1]])
    graphs.add(pack, pack.labels)

    def failing(run: Callable[[], Tensor]) -> Any:
        raise error

    monkeypatch.setattr(recorder[0], "record", failing)
    with pytest.raises(kind, match=message):
        graphs.add(pack, pack.labels)


def test_a_shape_too_many_is_launched_and_said_once(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_graphs, "_MOST_SHAPES", 1)
    config, said = config_of(train={"accumulate": 2}), []
    plain = [s.loss for s in run(step_of(files, config)[1])]
    model, step = step_of(files, config)
    graphs = PackGraphs(model, 32, said.append, record=False)
    step.use_graphs(graphs)
    assert [s.loss for s in run(step)] == pytest.approx(plain, abs=2e-5)
    assert len(graphs._shapes) == 1
    (line,) = said
    assert line.startswith("train.cuda_graph: packs come in more than 1 shapes")


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "launches"])
@pytest.mark.parametrize(
    "config",
    [
        config_of(lora={"dropout": 0.3}, train={"accumulate": 2}),
        config_of("full", train={"rounding": "stochastic"}),
        config_of(**JOINT),
    ],
    ids=["dropout", "stochastic", "joint"],
)
def test_going_on_is_bit_for_bit(files: ModelFiles, config: RunConfig, graphs: bool) -> None:
    """Gradients of a step that was begun and not made are forgotten."""

    def trainer() -> tuple[SftTrainer, list[float]]:
        model, step = step_of(files, config)
        if graphs:
            step.use_graphs(PackGraphs(model, 32, lambda line: None, record=False))
        step.runs_ahead = True
        losses: list[float] = []
        order = step._order
        made = SftTrainer(config, model, step, order, None, lambda m: losses.append(m.loss))
        return made, losses

    whole, losses = trainer()
    whole.run()
    half, some = trainer()
    half.run(until=lambda: half.step == 3)
    grads = [t.grad for t in half.engine.tensors.values()]
    assert all(g is None if not graphs else g is not None and not g.any() for g in grads)
    resumed, rest = trainer()
    resumed.restore(half.step, *half.state(), half.notes())
    resumed.run()
    half.run()
    assert [*some[:3], *rest] == losses == some
    for name, tensor in whole.engine.tensors.items():
        assert torch.equal(tensor, resumed.engine.tensors[name]), name
        assert torch.equal(tensor, half.engine.tensors[name]), name


def test_the_next_steps_gradients_do_not_touch_the_weights(files: ModelFiles) -> None:
    config = config_of("full")
    plain, (model, step) = step_of(files, config)[1], step_of(files, config)
    step.use_graphs(PackGraphs(model, 32, lambda line: None, record=False))
    for i in range(3):
        plain.run(i)
        step.run(i)
        assert any(t.grad is not None and t.grad.any() for t in step.tensors.values())
        for name, tensor in plain.tensors.items():
            torch.testing.assert_close(step.tensors[name], tensor, rtol=1e-3, atol=5e-5)
        state, other = step.updates.state(), plain.updates.state()
        assert state.keys() == other.keys()
        assert all(state[k] == other[k] for k in state if k.endswith("/step"))


def test_a_loss_that_is_no_number_ends_the_run(files: ModelFiles) -> None:
    model, step = step_of(files, config_of())
    step.use_graphs(PackGraphs(model, 32, lambda line: None, record=False))
    step.run(0)
    model.head.data = torch.full_like(model.head, torch.nan)
    # its gradients were there already
    step.run(1)
    with pytest.raises(TrainingError, match="step 3: loss nan"):
        step.run(2)


@pytest.mark.parametrize(
    ("config", "change", "reason"),
    [
        (
            config_of(train={"engine": "modules", "cuda_graph": True}),
            {},
            "transformers' modules wait",
        ),
        (config_of(), {"attention": "sdpa"}, "sft.attention=varlen does not"),
        (config_of("full", train={"in_backward": True}), {}, "train.in_backward updates"),
        (
            config_of("full", distributed={"offload": True}),
            {},
            "shares of the weights in the host's",
        ),
        (config_of(distributed={"weights": "sharded"}), {}, "gathered block by block"),
        (config_of(train={"optimizer": "adamw-8bit"}), {}, None),
        (config_of(), {}, None),
    ],
    ids=["modules", "sdpa", "in-backward", "offload", "sharded", "8-bit", "none"],
)
def test_what_keeps_a_step_from_being_captured_is_said(
    config: RunConfig, change: dict[str, Any], reason: str | None, files: ModelFiles,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = load_causal(files, dtype=torch.float32, device=torch.device("cpu"))
    if config.method == "full":
        model.train_all()
    fuse_for_texts(model, config)
    # as on a GPU
    model.attention = change.get("attention", "varlen")
    monkeypatch.setattr(EarlyModel, "device", torch.device("cuda"))
    found, said = why_not_captured(config, model), []
    assert captures(config, model, said.append) == (reason is None)
    if reason is None:
        assert found is None
        assert said == []
    else:
        assert found is not None
        assert reason in found
        assert said == [f"train.cuda_graph: a step's kernels are launched one by one: {found}"]


def test_modules_that_no_graph_was_asked_for_are_launched_without_a_word(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(train={"engine": "modules"})
    model, _ = step_of(files, config)
    monkeypatch.setattr(EarlyModel, "device", torch.device("cuda"))
    said: list[str] = []
    assert not captures(config, model, said.append)
    assert said == []


def test_the_rule_is_a_blocks_weights_times_tokens(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of()
    model, _ = step_of(files, config)
    model.attention = "varlen"
    layers = [m for m in model.early.blocks[0].modules() if isinstance(m, torch.nn.Linear)]
    frozen = sum(m.weight.numel() for m in layers if m.out_features > 4 < m.in_features)
    assert block_weights(model) == frozen
    says: list[str] = []
    assert not captures(config, model, says.append)
    monkeypatch.setattr(EarlyModel, "device", torch.device("cuda"))
    monkeypatch.setattr(pack_graphs, "_LAUNCH_BOUND", frozen * 32)
    on = {c: config_of(train={"cuda_graph": c}) for c in ("auto", True, False)}
    assert {c: captures(run, model, says.append) for c, run in on.items()} == {
        "auto": True, True: True, False: False,
    }  # fmt: skip
    monkeypatch.setattr(pack_graphs, "_LAUNCH_BOUND_OF_SHARES", frozen * 32 - 1)
    full = config_of("full")
    assert [captures(run, model, says.append, 2) for run in (full, *on.values())] == [
        False, True, True, False,
    ]  # fmt: skip
    assert captures(full, model, says.append)
    monkeypatch.setattr(pack_graphs, "_LAUNCH_BOUND_OF_SHARES", frozen * 32)
    assert captures(full, model, says.append, 2)
    # of rows that a rank takes at once
    twice = config_of("full", train={"batch_size": 2})
    assert not captures(twice, model, says.append)
    assert captures(twice, model, says.append, 2)
    assert not captures(
        config_of("full", train={"batch_size": 2, "accumulate": 2}), model, says.append, 2
    )
    monkeypatch.setattr(pack_graphs, "_LAUNCH_BOUND", frozen * 32 - 1)
    assert {c: captures(run, model, says.append) for c, run in on.items()} == {
        "auto": False, True: True, False: False,
    }  # fmt: skip
    assert says == []
