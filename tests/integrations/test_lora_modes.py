"""Layers with adapters under autocast, in other dtypes, inside ``torch.func``, and their second derivatives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.conftest import adapt, assert_close, gradients
from tests.second_gradients import second_gradients
from tli_engine import accelerate

Load = Callable[..., Any]


def layer_of(model: Any) -> Any:
    return model.get_base_model().model.layers[1].self_attn.q_proj


def pair(load: Load, **options: Any) -> tuple[Any, Any]:
    """The same layer with an adapter, PEFT's and the engine's."""
    plain, model = adapt(load(**options)), adapt(load(**options))
    accelerate(model)
    return layer_of(plain), layer_of(model)


def rows() -> Tensor:
    return torch.randn(5, 64, requires_grad=True)


def test_autocast_is_pefts(load: Load) -> None:
    x, found = rows(), []
    for layer in pair(load, nf4=False):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.float().square().sum().backward()
        found.append((y, x.grad, *gradients(layer).values()))
        x.grad = None
    assert found[0][0].dtype == torch.bfloat16
    # to the bit: the engine's own update is rounded once, with the product
    assert len(found[0]) == 4
    assert all(map(torch.equal, *found))


def test_updates_of_4bit_layers_under_autocast_are_pefts(load: Load) -> None:
    """The products below are not: bitsandbytes' rounds its input to bf16."""
    x, found = rows(), []
    for layer in pair(load):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(layer(x) - layer.base_layer(x))
    assert found[0].dtype == found[1].dtype == torch.float32
    assert_close(found[1], found[0])


def test_a_compute_dtype_other_than_the_inputs(load: Load) -> None:
    """It is the base's alone: PEFT adds the update in the input's."""
    x = rows()
    theirs, ours = pair(load)
    in_fp32 = ours(x)
    for layer in (theirs, ours):
        layer.base_layer.compute_dtype = torch.bfloat16
    expected, actual = theirs(x), ours(x)
    assert actual.dtype == expected.dtype == torch.float32
    rounding = (in_fp32 - expected).abs().mean()
    assert rounding > 1e-3
    # single sums may round otherwise
    assert (actual - expected).abs().mean() < rounding / 10


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_of_4bit_layers_are_trained(
    load: Load, tokens: dict[str, Tensor], bias: str
) -> None:
    found = []
    for accelerated in (False, True):
        model = adapt(load("qwen2"), bias=bias)
        if accelerated:
            accelerate(model)
        model(**tokens, labels=tokens["input_ids"]).loss.backward()
        found.append(gradients(model))
    # of q and v, and of k where all are trained, in four blocks
    assert sum("bias" in name for name in found[0]) == (12 if bias == "all" else 8)
    assert found[1].keys() == found[0].keys()
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient, 1e-4)


@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
def test_gradients_of_gradients(load: Load, tokens: dict[str, Tensor], nf4: bool) -> None:
    theirs, ours = second_gradients(lambda: adapt(load(nf4=nf4)), tokens)
    for name, gradient in theirs.items():
        assert_close(ours[name] / gradient.abs().max(), gradient / gradient.abs().max(), 1e-4)


def test_gradients_by_torch_func(load: Load, tokens: dict[str, Tensor]) -> None:
    """Dense layers: neither bitsandbytes' product nor the engine's goes through these transforms."""
    found: list[dict[str, Tensor]] = []
    for accelerated in (False, True):
        model = adapt(load(nf4=False))
        model.get_base_model().set_attn_implementation("eager")
        if accelerated:
            accelerate(model)
        own = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

        def loss(own: dict[str, Tensor], model: Any = model) -> Tensor:
            options = {**tokens, "output_hidden_states": True}
            out = torch.func.functional_call(model, own, (), options)
            # the weights of the call are gone by now
            total: Tensor = out.hidden_states[2].square().mean() + out.logits.square().mean()
            return total

        found.append(torch.func.grad(loss)(own))
    assert len(found[0]) == 16
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient, 1e-4)
