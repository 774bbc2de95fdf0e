"""Lazy hidden states of whatever a model may be given: the eager ones bit for bit, and its errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.test_lazy_beside_others import assert_equal, read, reasons
from tli_engine import accelerate
from tli_engine.errors import UserError

Load = Callable[..., Any]
Tokens = dict[str, Tensor]


def _seeded(maker: Callable[..., Tensor], *sizes: Any) -> Tensor:
    return maker(*sizes, generator=torch.Generator().manual_seed(1))


def _words(*size: int) -> Tensor:
    return _seeded(torch.randint, 0, 256, size)


def _blocked(tokens: Tokens) -> Tensor:
    """Which tokens each may look at, drawn; the first always."""
    seen = _seeded(torch.rand, 3, 1, 7, 7) > 0.3
    seen[..., 0] = True
    return seen.tril()


def _holes(mask: Tensor) -> Tensor:
    return mask * torch.tensor([1, 0, 1, 1, 0, 1, 1])


INPUTS: dict[str, Callable[[Tokens], Tokens]] = {
    "no mask": lambda t: {"input_ids": t["input_ids"]},
    "left padding": lambda t: {n: v.flip(1) for n, v in t.items()},
    "holes": lambda t: t | {"attention_mask": _holes(t["attention_mask"])},
    "positions": lambda t: t | {"position_ids": 2 * torch.arange(7).repeat(3, 1)},
    "a word's position": lambda t: {
        "input_ids": torch.tensor([[7]]),
        "position_ids": torch.tensor([[5]]),
        "attention_mask": torch.tensor([[1]]),
    },
    "vectors": lambda t: {
        "inputs_embeds": _seeded(torch.randn, 3, 7, 64),
        "attention_mask": t["attention_mask"],
    },
    "mask of pairs": lambda t: t | {"attention_mask": _blocked(t)},
    "mask of numbers": lambda t: t | {"attention_mask": torch.where(_blocked(t), 0.0, -1e9)},
    "beyond a window": lambda t: {"input_ids": _words(2, 20)},
    "beyond a window, padded": lambda t: {
        "input_ids": _words(2, 20),
        "attention_mask": torch.tensor([[1] * 20, [0] * 5 + [1] * 15]),
    },
    # several texts in a row, if there is no cache
    "a pack": lambda t: {
        "input_ids": _words(1, 7),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]]),
        "use_cache": False,  # type: ignore[dict-item]
    },
}


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
def test_values_are_the_eager_ones(load: Load, tokens: Tokens, family: str) -> None:
    model = load(family, nf4=False, **({} if family == "llama" else {"sliding_window": 3})).eval()
    inputs = {name: make(tokens) for name, make in INPUTS.items()}
    with torch.no_grad():
        expected = {n: model(**given, output_hidden_states=True) for n, given in inputs.items()}
        accelerate(model)
        for name, given in inputs.items():
            out = model(**given, output_hidden_states=True)
            assert type(out.hidden_states) is not tuple, name
            assert_equal(read(out), read(expected[name]))


@pytest.mark.parametrize("given", ["positions", "positions of vectors"])
def test_positions_without_a_mask(load: Load, tokens: Tokens, given: str) -> None:
    """Transformers takes them for a pack's where a call makes no cache, and the blocks are run without one."""
    model = load(nf4=False).eval()
    inputs = {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]])}
    if given == "positions":
        inputs["input_ids"] = _words(1, 7)
    else:
        inputs["inputs_embeds"] = _seeded(torch.randn, 1, 7, 64)
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True)
        packed = model(**inputs, output_hidden_states=True, use_cache=False)
        assert not torch.allclose(expected.logits, packed.logits)
        accelerate(model)
        actual = model(**inputs, output_hidden_states=True)
    assert_equal(read(actual), read(expected))
    assert reasons(model) == ["position_ids without an attention_mask, and a cache"]
    accelerate(model, stop_at=2)
    with pytest.raises(UserError, match=r"; position_ids without an attention_mask"):
        model(**inputs, output_hidden_states=True)


def test_a_mask_that_is_cut(load: Load, tokens: Tokens) -> None:
    """Longer than the tokens, which transformers takes where a call makes a cache."""
    model = load(nf4=False).eval()
    mask = torch.ones(3, 9, dtype=torch.int64)
    with torch.no_grad():
        expected = model(tokens["input_ids"], mask, output_hidden_states=True)
        accelerate(model)
        actual = model(tokens["input_ids"], mask, output_hidden_states=True)
    assert_equal(read(actual), read(expected))
    assert reasons(model) == ["an attention_mask longer or shorter than its tokens, and a cache"]


def test_a_cache_that_is_given_is_filled_at_the_call(load: Load, tokens: Tokens) -> None:
    from transformers import DynamicCache

    model = load(nf4=False).eval()
    accelerate(model)
    cache = DynamicCache(config=model.config)
    out = model(**tokens, past_key_values=cache, output_hidden_states=True)
    assert cache.get_seq_length() == 7
    assert type(out.hidden_states) is tuple


@pytest.mark.parametrize("shape", [(1, 0), (0, 3), (0,)], ids=str)
def test_no_tokens_are_transformers_error(load: Load, shape: tuple[int, ...]) -> None:
    model, errors = load(nf4=False).eval(), []
    for accelerated in (False, True):
        if accelerated:
            accelerate(model)
        with pytest.raises(RuntimeError) as error:
            model(input_ids=torch.zeros(shape, dtype=torch.int64), output_hidden_states=True)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("index", [5, -6, "logits", 1.0])
def test_what_is_no_index_of_a_tuple(load: Load, tokens: Tokens, index: Any) -> None:
    model = load(nf4=False).eval()
    expected = model(**tokens, output_hidden_states=True).hidden_states
    accelerate(model)
    states = model(**tokens, output_hidden_states=True).hidden_states
    errors = []
    for found in (expected, states):
        with pytest.raises((IndexError, TypeError)) as error:
            found[index]
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]
