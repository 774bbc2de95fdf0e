"""Attention of one projection that holds q, k and v: the bits of three, and one gradient."""

import pytest
import torch
from torch import Tensor

from tli_engine.ops import joined_word_attention, word_attention, word_bounds

HEADS, D = [4, 2, 2], 16


def make_inputs(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """A projection of 9 tokens in 3 words, and their angles and bounds."""
    offsets = torch.tensor([0, 3, 4, 9], device=device)
    angles = torch.rand(9, D // 2, device=device)
    qkv = torch.randn(9, sum(HEADS), D, device=device).to(dtype)
    return qkv, [angles.cos(), angles.sin(), word_bounds(offsets, 9)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_joined_heads_give_the_same_bits_and_one_gradient(
    dtype: torch.dtype, device: torch.device
) -> None:
    qkv, tokens = make_inputs(dtype, device)
    parts = [part.clone().requires_grad_() for part in torch.split(qkv, HEADS, 1)]
    qkv.requires_grad_()
    out = joined_word_attention(qkv, HEADS, *tokens)
    expected = word_attention(*parts, *tokens)
    assert torch.equal(out, expected)
    dout = torch.randn_like(out)
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    assert torch.equal(dqkv, torch.cat(torch.autograd.grad(expected, parts, dout), 1))
    assert dqkv.is_contiguous()


def test_operator_contract(device: torch.device) -> None:
    qkv, tokens = make_inputs(torch.float32, device)
    arguments = (qkv.requires_grad_(), HEADS[0], *tokens, 0.25)
    torch.library.opcheck(torch.ops.tli_engine.joined_word_attention.default, arguments)


def test_heads_that_do_not_add_up_are_named(device: torch.device) -> None:
    qkv, tokens = make_inputs(torch.float32, device)
    with pytest.raises(ValueError, match=r"qkv must be \[T, 12, D\], got \[9, 8, 16\]"):
        joined_word_attention(qkv, [4, 4, 4], *tokens)
