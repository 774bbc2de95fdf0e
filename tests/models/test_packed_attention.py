"""Attention inside each word of a pack: the definition, and what must not be seen."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from tli_engine.data.words import Pack, pack
from tli_engine.models.packed_attention import NAME, packed_attention
from tli_engine.testing import random_words

HEADS, D = 4, 8
PACKS = [
    pytest.param([5], id="one-word"),
    pytest.param([1], id="one-token"),
    pytest.param([1, 1, 1], id="tokens-alone"),
    pytest.param([4, 4, 4], id="equal"),
    pytest.param([9, 1, 6, 2], id="ragged"),
]


class Attention(nn.Module):
    """What the function asks of the module that calls it."""

    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def make_inputs(
    lengths: list[int], key_heads: int, dtype: torch.dtype, device: torch.device
) -> tuple[Pack, Tensor, Tensor, Tensor]:
    words = [random_words(1, n, prefix=0)[0] for n in lengths]
    q, k, v = (
        torch.randn(1, heads, sum(lengths), D, device=device).to(dtype)
        for heads in (HEADS, key_heads, key_heads)
    )
    return pack(words).to(device), q, k, v


def attend(words: Pack, q: Tensor, k: Tensor, v: Tensor, scaling: float | None = None) -> Tensor:
    module = Attention(q.shape[1] // k.shape[1])
    out, weights = packed_attention(module, q, k, v, None, scaling=scaling, pack=words)
    assert weights is None
    return out


def naive(words: Pack, q: Tensor, k: Tensor, v: Tensor, scaling: float = D**-0.5) -> Tensor:
    """Token by token: softmax over the tokens of the own word up to itself; in q's dtype."""
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q).transpose(1, 2)
    for start, end in pairwise(words.offsets.tolist()):
        for t in range(start, end):
            for h in range(q.shape[1]):
                seen = slice(start, t + 1)
                scores = k[0, h // group, seen] @ q[0, h, t] * scaling
                out[0, t, h] = scores.softmax(0) @ v[0, h // group, seen]
    return out


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("lengths", PACKS)
def test_equals_the_definition(lengths: list[int], key_heads: int, device: torch.device) -> None:
    words, *qkv = make_inputs(lengths, key_heads, torch.float64, device)
    actual = attend(words, *qkv)
    assert actual.shape == (1, sum(lengths), HEADS, D)
    torch.testing.assert_close(actual, naive(words, *qkv), rtol=0, atol=1e-12)


def test_scaling_is_the_callers(device: torch.device) -> None:
    words, *qkv = make_inputs([4, 2], 2, torch.float64, device)
    torch.testing.assert_close(
        attend(words, *qkv, scaling=0.7), naive(words, *qkv, scaling=0.7), rtol=0, atol=1e-12
    )


def test_a_word_sees_neither_the_others_nor_what_follows(device: torch.device) -> None:
    """The gradient of one token's output reaches the tokens it may see, and no others."""
    words, q, k, v = make_inputs([3, 5, 2], 2, torch.float64, device)
    k.requires_grad_(), v.requires_grad_()
    token = 5  # the third of the second word, which begins at 3
    attend(words, q, k, v)[0, token].sum().backward()
    for grad in (k.grad, v.grad):
        assert grad is not None
        seen = grad.abs().sum((0, 1, 3)) > 0
        assert seen.tolist() == [t in (3, 4, 5) for t in range(10)]


@pytest.mark.parametrize("lengths", [[5], [3, 1, 2]], ids=str)
def test_gradient(lengths: list[int], device: torch.device) -> None:
    words, *qkv = make_inputs(lengths, 2, torch.float64, device)
    inputs = tuple(x.requires_grad_() for x in qkv)
    assert torch.autograd.gradcheck(lambda *x: attend(words, *x), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_word_has_the_same_values_in_any_pack(dtype: torch.dtype, device: torch.device) -> None:
    words, q, k, v = make_inputs([4, 9, 1], 2, dtype, device)
    together = attend(words, q, k, v)
    alone = attend(
        pack(random_words(1, 9, prefix=0)).to(device), *(x[:, :, 4:13] for x in (q, k, v))
    )
    bound = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(together[:, 4:13], alone, rtol=bound, atol=bound)


@pytest.mark.parametrize("lengths", [[9], [9, 3, 5]], ids=str)
@pytest.mark.parametrize("window", [1, 4, 9, 20])
def test_a_window_hides_what_lies_before_it(lengths: list[int], window: int) -> None:
    words, q, k, v = make_inputs(lengths, 2, torch.float64, torch.device("cpu"))
    options: Any = {"scaling": None, "sliding_window": window, "pack": words}
    out, _ = packed_attention(Attention(2), q, k, v, None, **options)
    for start, end in pairwise(words.offsets.tolist()):
        for t in range(start, end):
            first = max(start, t + 1 - window)
            # the definition on the tokens of the window alone, as a word
            seen = slice(first, t + 1)
            alone = pack([random_words(1, t + 1 - first, prefix=0)[0]])
            exact = naive(alone, *(x[:, :, seen] for x in (q, k, v)))[:, -1]
            torch.testing.assert_close(out[:, t], exact, rtol=0, atol=1e-12)


def test_is_registered_under_its_name() -> None:
    registered: Any = AttentionInterface()[NAME]
    assert registered is packed_attention
