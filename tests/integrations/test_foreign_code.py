"""Code of a script's own may do otherwise at each call: such calls are computed at once, and not remembered."""

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations import sdpa_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from tests.integrations.test_memo import WORD, counts, remember, states
from tli_engine.errors import UserError
from tli_engine.integrations.held_code import is_known
from tli_engine.integrations.weight_writes import watched

Load = Callable[..., Any]
Patch = pytest.MonkeyPatch
# what the code below multiplies by
STRENGTH = types.SimpleNamespace(value=1.0)


@pytest.fixture(autouse=True)
def _watched() -> Iterator[None]:
    STRENGTH.value = 1.0
    with watched():
        yield


class _Steered(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out * STRENGTH.value


class _Noisy(_Steered):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.randn_like(x)


class _Helping(modeling_llama.LlamaMLP):
    """Its forward is another's."""

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return functools.partial(_scaled, found) if name == "act_fn" else found


def _scaled(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    out = function(*args, **kwargs)
    return (out[0] * STRENGTH.value, *out[1:]) if isinstance(out, tuple) else out * STRENGTH.value


def _wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: _scaled(function, *args, **kwargs)


def _put(owner: Any, name: str, patch: Patch) -> None:
    patch.setattr(owner, name, _wrapped(getattr(owner, name)))


def _under_no_grad(mlp: nn.Module) -> None:
    mlp.forward = torch.no_grad()(_wrapped(mlp.forward))


def _of_another(model: Any, patch: Patch) -> None:
    other = type(_mlp(model))(model.config)
    patch.setattr(other, "forward", _wrapped(other.forward))
    _mlp(model).forward = other.__call__


def _attend(model: Any, patch: Patch) -> None:
    sdpa = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "mine", _wrapped(_SDPA))
    patch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "mine", sdpa)
    model.set_attn_implementation("mine")


def _mlp(model: Any) -> Any:
    return model.model.layers[1].mlp


def _replace_mlp(model: Any, kind: Callable[[Any], nn.Module]) -> None:
    model.model.layers[1].mlp = kind(_mlp(model)).eval()


def _class_of_helper(model: Any) -> None:
    _mlp(model).__class__ = _Helping


_SDPA = ALL_ATTENTION_FUNCTIONS["sdpa"]
FOREIGN: dict[str, Callable[[Any, Patch], object]] = {
    "forward": lambda m, p: _put(_mlp(m), "forward", p),
    "call": lambda m, p: _put(_mlp(m), "_call_impl", p),
    "decorated": lambda m, p: _under_no_grad(_mlp(m)),
    "another's": _of_another,
    "class": lambda m, p: _put(modeling_llama.LlamaMLP, "forward", p),
    "class of a script": lambda m, p: _class_of_helper(m),
    "wrapper": lambda m, p: _replace_mlp(m, _Steered),
    "noise": lambda m, p: _replace_mlp(m, _Noisy),
    "attention": _attend,
    "attention's file": lambda m, p: _put(sdpa_attention, "sdpa_attention_forward", p),
    "silu": lambda m, p: _put(F, "silu", p),
    "linear": lambda m, p: _put(F, "linear", p),
    "sdpa": lambda m, p: _put(F, "scaled_dot_product_attention", p),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_state_of_its_own_is_met(load: Load, kind: str, monkeypatch: Patch) -> None:
    """Put on once, then varied, as a scan of knock-outs does."""
    model = load(nf4=False).eval()
    remember(model)
    states(model)[3]
    FOREIGN[kind](model, monkeypatch)
    for value in (1.0, 0.5, 0.0):
        STRENGTH.value = value
        torch.manual_seed(0)
        found = states(model)
        # set anew before they are read
        STRENGTH.value = 7.0
        found = found[3]
        STRENGTH.value = value
        torch.manual_seed(0)
        assert torch.equal(found, states(model, use_cache=True)[3])
    reasons = [n for n in counts(model) if n.startswith("at once: code runs in it")]
    assert len(reasons) == 1


def test_what_was_put_on_for_a_call_alone(load: Load) -> None:
    model = load(nf4=False).eval()
    expected = states(model)[3]
    remember(model)
    with pytest.MonkeyPatch.context() as patch:
        _put(_mlp(model), "forward", patch)
        STRENGTH.value = 0.0
        unread = states(model)
    assert not torch.equal(unread[3], expected)
    assert torch.equal(states(model)[3], expected)
    assert counts(model)["lazy"] == 1


@pytest.mark.parametrize("name", ["scaled_dot_product_attention", "linear", "silu"])
def test_a_function_of_torch_that_changed_before_the_reading(
    load: Load, name: str, monkeypatch: Patch
) -> None:
    model = load(nf4=False).eval()
    remember(model)
    unread = states(model)
    _put(F, name, monkeypatch)
    with pytest.raises(UserError, match=f"was not read before a class's or a file's {name} was"):
        unread[3]


def test_a_function_of_attentions_file_is_seen(load: Load, monkeypatch: Patch) -> None:
    model = load(nf4=False).eval()
    remember(model)
    unread = states(model)
    _put(sdpa_attention, "repeat_kv", monkeypatch)
    with pytest.raises(UserError, match="repeat_kv was changed"):
        unread[3]
    states(model)
    assert counts(model)["at once: code runs in it that no known library wrote: repeat_kv"] == 1


class _Halves(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out * 0.5 if func is F.silu else out


class _HalvesKernels(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out * 0.5 if func is torch.ops.aten.silu.default else out


@pytest.mark.parametrize("mode", [_Halves, _HalvesKernels])
def test_modes_of_torch(load: Load, mode: Callable[[], AbstractContextManager[Any]]) -> None:
    model = load(nf4=False).eval()
    expected = states(model)[3]
    with mode():
        other = states(model)[3]
    remember(model)
    for context, value in ((nullcontext, expected), (mode, other), (nullcontext, expected)):
        with context():
            unread = states(model)
        assert torch.equal(unread[3], value)
    assert counts(model)["at once: a mode of torch watches what runs"] == 1
    with torch.device("cpu"):
        states(model)
    assert counts(model)["lazy"] == 3


def test_attention_that_is_not_in_use_does_no_harm(load: Load, monkeypatch: Patch) -> None:
    model = load(nf4=False).eval()
    remember(model)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "mine", _wrapped(_SDPA))
    states(model)
    assert counts(model)["lazy"] == 1


def test_functions_of_libraries_are_known() -> None:
    linear = nn.Linear(2, 2)
    for function in (F.silu, F.linear, torch.matmul, nn.Linear.forward, torch.no_grad()(F.silu)):
        assert is_known(function)
    assert is_known(linear.forward, {id(linear)})
    assert is_known(functools.partial(F.dropout, p=0.5))
    for function in (
        linear.forward,
        _scaled,
        torch.no_grad()(_scaled),
        functools.partial(_scaled, F.silu),
        functools.partial(F.linear, weight=torch.ones(2, 2)),
    ):
        assert not is_known(function, set())


def test_a_hook_of_the_embeddings_is_met(load: Load) -> None:
    model = load(nf4=False).eval()
    remember(model)
    expected = states(model)[2]
    embed = model.get_input_embeddings()
    blocks = counts(model)["blocks"]
    for register, hook in (
        (embed.register_forward_hook, lambda m, args, out: out * 2),
        (embed.register_forward_pre_hook, lambda m, args: (args[0] + 1,)),
    ):
        handle = register(hook)
        found = states(model)[2]
        assert not torch.equal(found, expected)
        assert torch.equal(found, states(model, use_cache=True)[2])
        handle.remove()
        assert torch.equal(states(model)[2], expected)
    assert counts(model)["not remembered: its embeddings have hooks"] == 2
    assert counts(model)["blocks"] == blocks + 4


def test_hooks_that_ask_for_gradients_do_no_harm(load: Load) -> None:
    model = load(nf4=False).eval()
    model.enable_input_require_grads()
    remember(model)
    for _ in range(2):
        states(model)[2]
    assert counts(model)["words"] == 1
    assert torch.equal(states(model)[2], states(model, WORD | {"use_cache": True})[2])
