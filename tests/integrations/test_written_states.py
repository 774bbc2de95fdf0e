"""Hidden states that a caller writes to: blocks above, logits and losses are those of what was computed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.conftest import adapt, assert_close, gradients
from tests.integrations.fake_graphs import recorded
from tli_engine import accelerate
from tli_engine.integrations.lazy_model import settings_of
from tli_engine.integrations.memo import Memo

Load = Callable[..., Any]


def call(model: Any, tokens: dict[str, Tensor]) -> Any:
    return model(**tokens, output_hidden_states=True, labels=tokens["input_ids"])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("k", range(-5, 0))
def test_writes_do_not_reach_what_is_computed_later(
    load: Load, tokens: dict[str, Tensor], k: int, mode: Any
) -> None:
    model = load(nf4=False).eval()
    with mode():
        eager = call(model, tokens)
        accelerate(model)
        out = call(model, tokens)
        given = out.hidden_states[k]
        given.zero_()
        assert torch.equal(out.logits, eager.logits)
        assert torch.equal(out.loss, eager.loss)
        for i in range(5):
            if i != k + 5:
                assert torch.equal(out.hidden_states[i], eager.hidden_states[i])
        # one tensor, as of a tuple
        assert out.hidden_states[k] is given
        assert not given.any()
        # summed in place, layer by layer
        total = sum_in_place(call(model, tokens).hidden_states)
        assert torch.equal(total, sum_in_place(eager.hidden_states))


def sum_in_place(states: Any) -> Tensor:
    total: Tensor = states[0]
    for state in states[1:]:
        total += state
    return total


def test_a_decoder_s_last_state(load: Load, tokens: dict[str, Tensor]) -> None:
    from transformers import AutoModel

    model = load(nf4=False, auto=AutoModel).eval()
    accelerate(model)
    settings = settings_of(model)
    assert settings is not None
    word = {"input_ids": tokens["input_ids"][:1]}
    for memo in (None, Memo()):
        settings.memo = memo
        with torch.no_grad():
            out = model(**word, output_hidden_states=True)
            assert out.last_hidden_state is out.hidden_states[-1]
            expected = out.last_hidden_state.clone()
            out.last_hidden_state.zero_()
            again = model(**word, output_hidden_states=True)
            assert torch.equal(again.last_hidden_state, expected)
            assert torch.equal(again.hidden_states[-1], expected)


@pytest.mark.parametrize("graphs", [False, True], ids=["launched", "replayed"])
@pytest.mark.parametrize("k", [0, 2, -1])
def test_gradients_of_what_is_written_to(
    load: Load, tokens: dict[str, Tensor], k: int, graphs: bool
) -> None:
    """A write is part of the caller's own loss, and of no other."""
    model = adapt(load(nf4=False), target_modules=["q_proj", "embed_tokens"])
    mask = tokens["attention_mask"][..., None]

    def step(write: bool) -> tuple[Tensor, dict[str, Tensor]]:
        out = call(model, tokens)
        if not write:
            out.loss  # noqa: B018
        state = out.hidden_states[k]
        pooled = (state.mul_(mask) if write else state * mask).square().mean()
        (out.loss + pooled).backward()
        return out.loss.detach(), gradients(model)

    loss, expected = step(write=False)
    assert len(expected) > 8
    if graphs:
        recorded(model)
    else:
        accelerate(model)
    for _ in range(5):
        actual = step(write=True)
        assert torch.equal(actual[0], loss)
        assert actual[1].keys() == expected.keys()
        for name, gradient in expected.items():
            assert_close(actual[1][name], gradient)


def test_a_loss_has_gradients_by_a_state_that_was_read(
    load: Load, tokens: dict[str, Tensor]
) -> None:
    model = load(nf4=False)

    def by_states() -> list[Tensor]:
        out = call(model, tokens)
        read = [out.hidden_states[k] for k in (0, 2, 4)]
        return list(torch.autograd.grad(out.loss, read))

    expected = by_states()
    accelerate(model)
    for actual, theirs in zip(by_states(), expected, strict=True):
        assert torch.equal(actual, theirs)
    out = call(model, tokens)
    with torch.no_grad():
        state = out.hidden_states[2]
    assert state.requires_grad
    assert torch.autograd.grad(out.loss, state)[0].any()


def test_nothing_is_copied_that_nothing_goes_on_from(load: Load, tokens: dict[str, Tensor]) -> None:
    def copies(model: Any, states: slice) -> int:
        with torch.profiler.profile() as profile:
            model(**tokens, output_hidden_states=True).hidden_states[states]
        return sum(e.count for e in profile.key_averages() if e.key == "aten::clone")

    model = load(nf4=False)
    accelerate(model)
    both = copies(model, slice(1, 3))
    assert copies(model, slice(2, 3)) == both - 1
    accelerate(model, stop_at=2)
    assert copies(model, slice(1, 3)) == both - 1
    assert copies(model, slice(2, 3)) == both - 2
