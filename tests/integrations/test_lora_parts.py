"""What is put on the parts of PEFT's layers is called as often, and does the same, as without the engine."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from tests.integrations.conftest import adapt, assert_close, gradients
from tli_engine import accelerate

Load = Callable[..., Any]
PARTS = ["base_layer", "lora_A", "lora_B", "lora_dropout"]
REGISTERED = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
]


def part(layer: Any, name: str) -> Any:
    return layer.base_layer if name == "base_layer" else getattr(layer, name)["default"]


def layer_of(model: Any) -> Any:
    return model.get_base_model().model.layers[1].self_attn.q_proj


def step(model: Any, tokens: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(**tokens, labels=tokens["input_ids"]).loss
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("nf4", [True, False])
@pytest.mark.parametrize("register", REGISTERED)
@pytest.mark.parametrize("name", PARTS)
def test_hooks_are_called(
    load: Load, tokens: dict[str, Tensor], nf4: bool, register: str, name: str
) -> None:
    calls = []
    for accelerated in (False, True):
        model = adapt(load(nf4=nf4))
        if accelerated:
            accelerate(model)
        seen: list[str] = []
        hook = getattr(part(layer_of(model), name), register)
        hook(lambda module, *a, seen=seen: seen.append(type(module).__name__))
        step(model, tokens)
        calls.append(seen)
    assert len(calls[0]) == 1
    assert calls[0] == calls[1]


@pytest.mark.parametrize("nf4", [True, False])
@pytest.mark.parametrize("name", ["forward", "full_backward", "forward_pre", "full_backward_pre"])
def test_hooks_of_all_modules_are_called(
    load: Load, tokens: dict[str, Tensor], nf4: bool, name: str
) -> None:
    calls = []
    for accelerated in (False, True):
        model = adapt(load(nf4=nf4))
        if accelerated:
            accelerate(model)
        seen: list[str] = []
        register: Any = getattr(torch_module, f"register_module_{name}_hook")
        handle = register(lambda module, *a, seen=seen: seen.append(type(module).__name__))
        try:
            step(model, tokens)
            model(**tokens, output_hidden_states=True)
        finally:
            handle.remove()
        calls.append(sorted(seen))
    assert calls[0] == calls[1]


class _Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def _forward(name: str) -> Callable[[Any], None]:
    def change(layer: Any) -> None:
        module = part(layer, name)
        theirs = module.forward
        module.forward = lambda x: theirs(x) * 3

    return change


def _change_input(layer: Any) -> None:
    layer.lora_dropout["default"].register_forward_pre_hook(lambda module, args: (args[0] * 0,))


CHANGES: dict[str, Callable[[Any], object]] = {
    **{f"forward of {name}": _forward(name) for name in PARTS},
    "another dropout": lambda layer: layer.lora_dropout.update({"default": _Twice()}),
    "its input": _change_input,
}


@pytest.mark.parametrize("nf4", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_parts_that_do_something_else(
    load: Load, tokens: dict[str, Tensor], nf4: bool, change: str
) -> None:
    found = []
    for accelerated in (False, True):
        model = adapt(load(nf4=nf4))
        plain = step(model, tokens)[0]
        if accelerated:
            accelerate(model)
        CHANGES[change](layer_of(model))
        found.append(step(model, tokens))
    assert not torch.allclose(found[0][0], plain)
    assert_close(found[1], found[0])


def test_a_forward_put_into_the_class(
    load: Load, tokens: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = nn.Linear.forward

    @functools.wraps(theirs)
    def forward(self: Any, x: Tensor) -> Tensor:
        return theirs(self, x) * 2

    found = []
    for nf4 in (True, False):
        model, other = adapt(load(nf4=nf4)), adapt(load(nf4=nf4))
        accelerate(other)
        with monkeypatch.context() as patch:
            patch.setattr(nn.Linear, "forward", forward)
            found.append((step(model, tokens), step(other, tokens)))
    for expected, actual in found:
        assert_close(actual, expected)
