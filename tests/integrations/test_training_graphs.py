"""Training steps from recordings: a stand-in for CUDA graphs, which a CPU has not, shows the logic."""

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.integrations.conftest import adapt, gradients
from tests.integrations.fake_graphs import counts, read, reasons, recorded
from tli_engine import accelerate
from tli_engine.integrations import training_graphs
from tli_engine.integrations.block_weights import BlockWeights, NotStaticError
from tli_engine.integrations.lazy_model import settings_of
from tli_engine.integrations.lazy_run import Step
from tli_engine.integrations.static_block import take_apart
from tli_engine.integrations.training_graphs import TrainingGraphs

Load = Callable[..., Any]
_ELSEWHERE = torch.empty((), device="meta")
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"]


def batches(tokens: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Batches of two lengths, with other words and other padding."""
    whole = [{n: t.roll(i, 0) for n, t in tokens.items()} for i in range(3)]
    return [*whole, *({n: t[:, :5].contiguous() for n, t in batch.items()} for batch in whole)]


def train(model: Any, tokens: dict[str, Tensor], steps: int = 9) -> list[Any]:
    """Losses and gradients of steps, whose two calls are of one shape or of two."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found, some = [], batches(tokens)
    for i in range(steps):
        first, second = (read(model, some[(i + j) % len(some)]) for j in (0, 1))
        loss = first.square().mean() - cosine_similarity(first.mean(1), second.mean(1)).sum()
        optimizer.zero_grad()
        loss.backward()
        found.append((loss.detach(), {n: p.grad.clone() for n, p in trained(model)}))
        optimizer.step()
    return found


def weights(model: Any) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def set_weights(model: Any, values: list[Tensor]) -> None:
    with torch.no_grad():
        own = [p for p in model.parameters() if p.requires_grad]
        for parameter, value in zip(own, values, strict=True):
            parameter.copy_(value)


def trained(model: Any) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in model.named_parameters() if p.grad is not None]


def assert_equal(actual: list[Any], expected: list[Any]) -> None:
    for (loss, grads), (their_loss, their_grads) in zip(actual, expected, strict=True):
        assert torch.equal(loss, their_loss)
        assert grads.keys() == their_grads.keys()
        for name, gradient in grads.items():
            assert torch.equal(gradient, their_grads[name]), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
def test_steps_are_those_of_launches_bit_for_bit(
    load: Load, tokens: dict[str, Tensor], family: str, nf4: bool
) -> None:
    model = adapt(load(family, nf4=nf4))
    state = weights(model)
    accelerate(model)
    expected = train(model, tokens)
    set_weights(model, state)
    recorder = recorded(model)
    assert_equal(train(model, tokens), expected)
    # two blocks, two shapes, and two calls of a shape at once, each forward and backward
    assert recorder.recorded == 16
    assert counts(model)["replayed"] == 2 * (18 - 4)
    assert counts(model)["recordings"] == 8
    # recordings are made as hidden states are read
    recording, first, read_ns = (
        counts(model)[f"{n}_ns"] for n in ("recording", "first_read", "read")
    )
    assert 0 < recording < recording + first < read_ns
    assert counts(model)["call_ns"] > 0
    assert not reasons(model)


def test_every_weight_may_be_trained(load: Load, tokens: dict[str, Tensor]) -> None:
    """And what is below has a gradient too."""
    model = load(nf4=False)
    state = weights(model)
    expected = train(model, tokens)
    set_weights(model, state)
    recorder = recorded(model)
    assert_equal(train(model, tokens), expected)
    assert recorder.recorded == 16


def test_calls_in_use_keep_their_recordings(load: Load, tokens: dict[str, Tensor]) -> None:
    model = adapt(load())
    recorder = recorded(model)
    for _ in range(2):
        read(model, tokens)
    held = [read(model, batch) for batch in batches(tokens)[:3]]
    assert recorder.recorded == 12
    # kernels of two blocks are compiled once
    assert recorder.launched == 2
    for state in reversed(held):
        state.square().sum().backward(retain_graph=True)
    ours = gradients(model)
    held[0].square().sum().backward()
    again = gradients(model)
    settings = settings_of(model.get_base_model())
    assert settings is not None
    settings.graphs = None
    sum(read(model, batch).square().sum() for batch in batches(tokens)[:3]).backward()
    torch.testing.assert_close(ours, gradients(model))
    read(model, batches(tokens)[0]).square().sum().backward()
    assert all(torch.equal(g, again[n]) for n, g in gradients(model).items())


def test_recordings_are_used_again(load: Load, tokens: dict[str, Tensor]) -> None:
    """Of calls whose backward pass is done, though their results are held, or that have none."""
    model = adapt(load())
    recorder = recorded(model)
    held = []
    for _ in range(6):
        state = read(model, tokens)
        state.sum().backward()
        held.append(state)
        read(model, tokens)
    assert recorder.recorded == 4
    assert all(torch.equal(held[0], state) for state in held)


def test_what_a_block_is_given_lies_where_it_runs() -> None:
    step = Step(nn.Identity(), (), {"position": _ELSEWHERE})
    with pytest.raises(NotStaticError, match="given a tensor on another device"):
        take_apart(step, torch.ones(1, 2, 3, requires_grad=True), BlockWeights([]))


def _scale(model: Any) -> None:
    model.get_base_model().model.layers[1].self_attn.v_proj.scaling["default"] *= 3


def _exchange_data(model: Any) -> None:
    weight = model.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"].weight
    weight.data = weight.data * 2


def _lay_out_anew(model: Any) -> None:
    """At the same place, with the same shape."""
    weight = model.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"].weight
    rows, columns = weight.shape
    weight.data = weight.data.view(columns, rows).t()


def _write_4bit(model: Any) -> None:
    model.get_base_model().model.layers[0].mlp.up_proj.weight.data.fill_(0x37)


def _merge(model: Any) -> None:
    model.get_base_model().model.layers[0].self_attn.q_proj.merge()


def _exchange_module(model: Any) -> None:
    layers = model.get_base_model().model.layers
    layers[0].mlp = copy.deepcopy(layers[1].mlp)


def _epsilon(model: Any) -> None:
    model.get_base_model().model.layers[0].input_layernorm.variance_epsilon = 0.5


def _second_adapter(model: Any) -> None:
    adapt(model, "second", seed=5)
    accelerate(model)
    model.set_adapter("second")


@pytest.mark.parametrize(
    "change",
    [
        *(_scale, _exchange_data, _lay_out_anew, _write_4bit, _merge, _exchange_module, _epsilon),
        *(_second_adapter, lambda model: model.get_base_model().set_attn_implementation("eager")),
    ],
)
def test_what_changes_is_never_replayed_as_it_was(
    load: Load, tokens: dict[str, Tensor], change: Callable[[Any], None]
) -> None:
    model = adapt(load())
    recorded(model)
    for _ in range(4):
        before = read(model, tokens)
    change(model)
    for _ in range(4):
        after = read(model, tokens)
        eager = model(**tokens, output_hidden_states=True, use_cache=True).hidden_states[2]
        assert torch.equal(after, eager)
    if "lambda" not in change.__name__:
        assert not torch.equal(after, before)


@pytest.mark.parametrize(
    ("prepare", "reason", "others"),
    [
        (lambda m: setattr(m.config, "_attn_implementation", "flash"), "attention is flash", 0),
        (lambda m: setattr(m.model.layers[1].mlp, "forward", len), "own", 1),
        (lambda m: setattr(m.model.layers[0].self_attn, "attention_dropout", 0.1), "drops out", 1),
        (lambda m: m.model.layers[1].register_full_backward_pre_hook(lambda *a: None), "hooks", 1),
        (lambda m: m.gradient_checkpointing_enable(), "run again", 0),
        (lambda m: setattr(m.model.layers[0].mlp, "act_fn", _Own()), "library", 1),
        (lambda m: m.model.layers[1].mlp.register_buffer("b", _ELSEWHERE), "another device", 1),
        (lambda m: m.requires_grad_(False), "nothing up to there is trained", 0),
    ],
    ids=["attention", "forward", "dropout", "hook", "checkpointing", "library", "device", "frozen"],
)
def test_what_may_differ_is_launched_and_said(
    load: Load, tokens: dict[str, Tensor], prepare: Callable[[Any], None], reason: str, others: int
) -> None:
    model = load(nf4=False)
    recorder = recorded(model)
    prepare(model)
    for _ in range(4):
        # what was put there cannot run
        with suppress(TypeError, KeyError):
            read(model, tokens)
    assert recorder.recorded == 2 * others
    assert len(reasons(model)) == 1
    assert reason in reasons(model)[0]


class _Own(nn.SiLU):
    __module__ = "peft.own"


def test_lora_dropout_and_two_adapters_are_launched(load: Load, tokens: dict[str, Tensor]) -> None:
    model = adapt(load(), lora_dropout=0.5)
    recorder = recorded(model)
    for _ in range(4):
        read(model, tokens)
    assert recorder.recorded == 0
    # without dropout at work they are static
    model.eval()
    for _ in range(4):
        read(model, tokens)
    assert recorder.recorded == 4


class _Watch(TorchDispatchMode):
    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        return func(*args, **(kwargs or {}))


def test_under_what_looks_at_launches(load: Load, tokens: dict[str, Tensor]) -> None:
    model = adapt(load(nf4=False))
    recorder = recorded(model)
    for _ in range(3):
        read(model, tokens)
    assert recorder.recorded == 4
    with torch.autocast("cpu", torch.bfloat16):
        read(model, tokens)
    with torch.autograd.graph.save_on_cpu():
        read(model, tokens)
    with torch.autograd.detect_anomaly(check_nan=False):
        read(model, tokens)
    inner = checkpoint(lambda: read(model, tokens), use_reentrant=False)
    inner.sum().backward()
    with _Watch() as watch:
        read(model, tokens)
    assert watch.seen > 50
    assert counts(model)["replayed"] == 2
    assert len(reasons(model)) == 3
    assert counts(model)["at once: a mode of torch watches what runs"] == 1
    with torch.no_grad():
        read(model, tokens)
    assert counts(model)["replayed"] == 2


def test_room_is_limited(
    load: Load, tokens: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapt(load(nf4=False))
    monkeypatch.setattr(training_graphs, "_IDLE", 6)
    recorder = recorded(model, limit=50)
    shapes = [{n: t[:, :length] for n, t in tokens.items()} for length in range(2, 7)]
    for i in (0, 0, 0, 1, 1, 1, 1):
        read(model, shapes[i], 1)
    assert recorder.recorded == 2
    assert reasons(model) == ["recordings hold 0 MiB already"]
    # those that were long not used go
    for _ in range(6):
        read(model, shapes[1], 1)
    assert recorder.recorded == 4
    settings = settings_of(model.get_base_model())
    assert settings is not None
    assert settings.graphs is not None
    assert len(settings.graphs._recordings) == 1
    assert recorder.given_back == 1
    big = {n: t.repeat(200, 1) for n, t in tokens.items()}
    read(model, big, 1)
    assert reasons(model)[1].startswith("more than 512 tokens")


def test_large_gradients_are_not_copied(
    load: Load, tokens: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_graphs, "_MOST_TRAINED", 10_000)
    model = load(nf4=False)
    recorder = recorded(model)
    for _ in range(3):
        read(model, tokens)
    assert recorder.recorded == 0
    assert reasons(model) == ["more than 10,000 trained numbers in a block"]
    model = adapt(model)
    recorder = recorded(model)
    for _ in range(3):
        read(model, tokens)
    assert recorder.recorded == 4


def test_a_failed_recording_is_said_once(load: Load, tokens: dict[str, Tensor]) -> None:
    model = adapt(load(nf4=False))
    recorder = recorded(model)

    def fail(run: Any, pool: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    recorder.record = fail  # type: ignore[method-assign]
    for _ in range(2):
        read(model, tokens)
    with pytest.warns(UserWarning, match="no CUDA graphs of training: operation not permitted"):
        expected = read(model, tokens)
    assert torch.equal(read(model, tokens), expected)


def test_only_gpus_have_graphs(load: Load, tokens: dict[str, Tensor]) -> None:
    model = adapt(load(nf4=False))
    accelerate(model)
    settings = settings_of(model.get_base_model())
    assert settings is not None
    settings.graphs = TrainingGraphs()
    for _ in range(4):
        read(model, tokens)
    assert not settings.counts["replayed"]
    assert not reasons(model)


def test_the_first_device_with_graphs_counts(load: Load, tokens: dict[str, Tensor]) -> None:
    """A model may be called on a CPU before it is moved."""
    model = adapt(load(nf4=False))
    recorder = recorded(model)
    settings = settings_of(model.get_base_model())
    assert settings is not None
    found = iter((None, None))
    settings.graphs = TrainingGraphs(lambda device: next(found, recorder))
    for _ in range(4):
        read(model, tokens)
    assert recorder.recorded == 4


def test_precision_set_by_either_way(load: Load, tokens: dict[str, Tensor]) -> None:
    """Once a script has set the newer, PyTorch's getter of the older is an error."""
    model = adapt(load(nf4=False))
    recorder, matmul = recorded(model), torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            matmul.fp32_precision = precision
            for _ in range(3):
                read(model, tokens)
    finally:
        matmul.fp32_precision = before
    assert recorder.recorded == 8
