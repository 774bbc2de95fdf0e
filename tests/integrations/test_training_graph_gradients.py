"""What autograd does with calls that were replayed: as with those that were launched."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.conftest import adapt, gradients
from tests.integrations.fake_graphs import counts, read, recorded
from tli_engine import accelerate

Load = Callable[..., Any]


def test_gradients_between_hidden_states(load: Load, tokens: dict[str, Tensor]) -> None:
    """In whatever order states are read, one depends on those below; and logits on all."""
    model = adapt(load())
    accelerate(model)

    def found() -> list[Tensor]:
        out = model(**tokens, output_hidden_states=True, labels=tokens["input_ids"])
        states = [out.hidden_states[k] for k in (3, 1, 4, 0, 2)]
        between = torch.autograd.grad(states[2].square().sum(), states[:2], retain_graph=True)
        out.loss.backward()
        return [*states, *between, out.logits, *gradients(model).values()]

    expected = found()
    recorder = recorded(model)
    for _ in range(4):
        actual = found()
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert recorder.recorded == 8
    assert counts(model)["replayed"] == 8


@pytest.mark.parametrize("trained", ["adapters", "adapters over nf4", "all"])
def test_gradients_of_gradients(load: Load, tokens: dict[str, Tensor], trained: str) -> None:
    model = load(nf4="nf4" in trained)
    model = model if trained == "all" else adapt(model)
    model.set_attn_implementation("eager")
    accelerate(model)

    def penalty() -> dict[str, Tensor]:
        loss = read(model, tokens).square().mean()
        own = [p for n, p in model.named_parameters() if p.requires_grad and "layers.0" in n]
        first = torch.autograd.grad(loss, own, create_graph=True)
        sum(g.square().sum() for g in first).backward()
        return gradients(model)

    expected = penalty()
    recorded(model)
    for _ in range(3):
        actual = penalty()
    assert counts(model)["replayed"] == 2
    states = model(**tokens, output_hidden_states=True).hidden_states
    loss = states[2].square().mean()
    with torch.no_grad():
        states[1].mul_(2)
    own = [p for n, p in model.named_parameters() if p.requires_grad and "layers.0" in n]
    # gradients alone do not ask for it
    torch.autograd.grad(loss, own, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, own, create_graph=True)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-2)


def test_a_weight_written_to_before_the_way_back_is_an_error(
    load: Load, tokens: dict[str, Tensor]
) -> None:
    model = adapt(load())
    recorded(model)
    for _ in range(3):
        state = read(model, tokens)
    assert counts(model)["replayed"] == 2
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        state.sum().backward()
    state = read(model, tokens)
    state.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        state.sum().backward()


def test_inputs_are_given_up_with_what_was_saved(load: Load, tokens: dict[str, Tensor]) -> None:
    """Some scripts hold the losses of all steps."""
    model = adapt(load())
    recorded(model)
    for _ in range(3):
        state = read(model, tokens)
    node: Any = state.grad_fn
    state.sum().backward(retain_graph=True)
    assert node.inputs
    state.sum().backward()
    assert not node.inputs
    with pytest.raises(RuntimeError, match="second time"):
        state.sum().backward()
