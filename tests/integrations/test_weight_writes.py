"""Writes to weights that version counters do not show: met by the memo, and between a call and its reading."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim import optimizer as torch_optimizer

from tests.integrations.conftest import adapt
from tests.integrations.test_memo import WORD, remember, states
from tli_engine import accelerate, restore
from tli_engine.errors import UserError
from tli_engine.integrations.weight_writes import certain_writes, watched, writes, writes_to

Load = Callable[..., Any]
CHANGED = r"was not read before the model's weights changed"


@pytest.fixture
def model(load: Load) -> Iterator[Any]:
    with watched():
        yield load(nf4=False).eval()


def _weight(model: Any) -> nn.Parameter:
    weight: nn.Parameter = model.model.layers[1].mlp.down_proj.weight
    return weight


# of a weight, something that is held of it from before, and how that is written to
HELD: dict[str, Callable[[nn.Parameter], Tensor]] = {
    "data": lambda p: p.data,
    "view": lambda p: p.data.view(-1),
    "row": lambda p: p.data[0],
    "of data": lambda p: p.data.data,
    "given": lambda p: _give(p),
}


def _give(parameter: nn.Parameter) -> Tensor:
    value = parameter.detach().clone()
    parameter.data = value
    return value


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("inferred", [False, True])
def test_what_is_held_of_a_weight(model: Any, held: str, inferred: bool) -> None:
    """As zeroth-order optimizers hold ``[p.data for p in parameters]``."""
    remember(model)
    alias = HELD[held](_weight(model))
    gc.collect()
    before, unread = states(model)[3], states(model, {"input_ids": WORD["input_ids"].clone()})
    for _ in range(2):
        assert torch.equal(states(model)[3], before)
    with torch.inference_mode() if inferred else nullcontext():
        alias.mul_(3)
    after = states(model)[3]
    assert not torch.equal(after, before)
    assert torch.equal(after, states(model, use_cache=True)[3])
    with pytest.raises(UserError, match=CHANGED):
        unread[3]


@pytest.mark.parametrize("write", ["data in place", "data", "held", "swapped"])
@pytest.mark.parametrize("grad", [False, True])
def test_between_a_call_and_its_reading(model: Any, write: str, grad: bool) -> None:
    accelerate(model)
    weight = _weight(model)
    held = weight.data
    with torch.set_grad_enabled(grad):
        out = model(**WORD, output_hidden_states=True)
    expected = states(model)[1]
    if write == "data in place":
        weight.data.mul_(2)
    elif write == "data":
        weight.data = weight.detach() * 2
    elif write == "held":
        held.mul_(2)
    else:
        torch.utils.swap_tensors(weight, nn.Parameter(weight.detach() * 2))
    # below what was written
    assert torch.equal(out.hidden_states[1], expected)
    with pytest.raises(UserError, match=CHANGED):
        out.hidden_states[2]


def test_looking_at_data_is_no_change(model: Any) -> None:
    expected = states(model)[3]
    accelerate(model)
    unread = states(model)
    weights = [p.data for p in model.parameters()]
    assert sum(float(w.norm()) for w in weights) > 0
    # nor is what becomes of memory that the weight has left, or of another model's
    weight = _weight(model)
    left = weight.data
    weight.data = weight.data.clone()
    again = states(model)
    left.zero_()
    nn.Parameter(torch.ones(2)).data.mul_(2)
    assert torch.equal(again[3], expected)
    with pytest.raises(UserError, match=CHANGED):
        unread[3]


def test_another_place_is_seen_without_watching(load: Load) -> None:
    model = load(nf4=False).eval()
    accelerate(model)
    unread = states(model)
    _weight(model).data = _weight(model) * 2
    with pytest.raises(UserError, match=CHANGED):
        unread[2]


@pytest.mark.parametrize("watching", [False, True])
def test_weights_that_a_layer_moves_itself(load: Load, watching: bool) -> None:
    """Those of bitsandbytes convert their biases as they run first."""
    with watched() if watching else nullcontext():
        model = load("qwen2", quant_type="fp4", dtype=torch.bfloat16) if _has_fp4() else None
        if model is None:
            pytest.skip("bitsandbytes has no fp4 on a CPU")
        for layer in model.modules():
            if isinstance(layer, bitsandbytes.nn.Linear4bit) and layer.bias is not None:
                layer.bias.data = layer.bias.data.float()
        accelerate(model)
        unread = states(model)
        moved = model.model.layers[0].self_attn.q_proj.bias
        where = moved.data_ptr()
        for k in range(5):
            assert unread[k].shape == (1, 4, 64)
        assert moved.data_ptr() != where


def _has_fp4() -> bool:
    try:
        bitsandbytes.functional.quantize_4bit(torch.ones(64, 64), quant_type="fp4")
    except (NotImplementedError, ValueError):
        return False
    return True


class _ByPointer(torch.optim.Optimizer):
    """Writes where version counters do not see it, as kernels do that are given pointers."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    array = parameter.detach().numpy()
                    array -= parameter.grad.numpy()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "pointer": _ByPointer,
    "torch": lambda p: torch.optim.AdamW(p, lr=0.1),
    "AdamW8bit": lambda p: bitsandbytes.optim.AdamW8bit(p, lr=0.1),
    "AdamW": lambda p: bitsandbytes.optim.AdamW(p, lr=0.1),
    "Lion": lambda p: bitsandbytes.optim.Lion(p, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("watching", [False, True])
def test_steps_of_optimizers(load: Load, name: str, watching: bool) -> None:
    """What was read before goes on being there, and what was not is refused, whoever wrote."""
    with watched() if watching else nullcontext():
        model = adapt(load(nf4=False))
        accelerate(model)
        optimizer = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])
        for _ in range(2):
            out = model(**WORD, output_hidden_states=True)
            out.hidden_states[2].square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert out.hidden_states[2].isfinite().all()
            assert out.hidden_states[1].isfinite().all()
            with pytest.raises(UserError, match=CHANGED):
                out.hidden_states[3]
            with pytest.raises(UserError, match=CHANGED):
                out.logits  # noqa: B018


def test_steps_on_other_models_do_no_harm(load: Load) -> None:
    model, other = adapt(load(nf4=False)), nn.Linear(2, 2)
    accelerate(model)
    out = model(**WORD, output_hidden_states=True)
    other(torch.ones(2)).sum().backward()
    version = other.weight._version
    _ByPointer(other.parameters()).step()
    assert other.weight._version == version
    # of this model, whose gradients are not there yet
    _ByPointer(model.parameters()).step()
    assert out.hidden_states[3].requires_grad


def test_a_compiled_step_has_no_more_graphs(load: Load) -> None:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    with _no_hooks_of_others():
        before = _graphs(optimizer)
        model = load(nf4=False)
        accelerate(model)
        model(**WORD, output_hidden_states=True)
        assert _graphs(optimizer) == before


def _graphs(optimizer: torch.optim.Optimizer) -> int:
    torch._dynamo.reset()
    counters.clear()
    torch.compile(lambda: optimizer.step(), backend="eager")()
    found: int = counters["stats"]["unique_graphs"]
    return found


def test_hooks_of_steps_go_with_the_last_model(load: Load) -> None:
    with _no_hooks_of_others():
        models = [load(nf4=False), load(nf4=False)]
        for model in models:
            accelerate(model)
            model(**WORD, output_hidden_states=True)
        assert len(torch_optimizer._global_optimizer_post_hooks) == 1
        for model in models:
            restore(model)
        gc.collect()
        assert not torch_optimizer._global_optimizer_post_hooks
        assert not torch_optimizer._global_optimizer_pre_hooks


@contextmanager
def _no_hooks_of_others() -> Iterator[None]:
    """Models of other tests are given up."""
    gc.collect()
    assert not torch_optimizer._global_optimizer_post_hooks
    yield


def test_what_counts() -> None:
    parameter, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with watched():
        seen, since = writes(), certain_writes()
        assert float(parameter.data.sum()) == 2
        assert (writes(), certain_writes()) == (seen + 1, since)
        parameter.data.mul_(2)
        assert (writes(), certain_writes()) == (seen + 3, since + 1)
        assert writes_to([other, None, parameter], since) == {id(parameter): since + 1}
        assert not writes_to([other, None], since)
        assert not writes_to([parameter], since + 1)
        meta = nn.Parameter(torch.ones(2, device="meta"))
        assert meta.data.is_meta
        with torch.inference_mode():
            inferred = nn.Parameter(torch.ones(2), requires_grad=False)
        assert inferred.data.is_inference()
    assert "data" not in torch.Tensor.__dict__


@pytest.mark.parametrize("name", ["absmax", "state2.absmax", "offset"])
def test_statistics_of_an_accelerated_layer(load: Load, name: str) -> None:
    """Written in place after a call: the layer reads them anew, and lays them out anew where it holds a copy."""
    after = []
    for reads_before in (True, False):
        model = load(double_quant=True).eval()
        accelerate(model)
        if reads_before:
            states(model)[3]
        layer = model.model.layers[1].mlp.up_proj
        frozen, state = layer.frozen_weight(), layer.weight.quant_state
        assert frozen.is_of(layer.weight)
        holder = state.state2 if name == "state2.absmax" else state
        getattr(holder, name.rpartition(".")[2]).mul_(2)
        assert not frozen.is_of(layer.weight)
        after.append(states(model)[3])
    assert torch.equal(*after)
