from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tli_engine.ops import word_attention, word_bounds
from tli_engine.reference.word_attention import rotate, words_by_length
from tli_engine.testing import assert_within_error_budget

pytest.importorskip("triton")
from tli_engine.kernels.dense_rows import with_dense_rows
from tli_engine.kernels.word_attention import Tile, forward_tile, launch_forward
from tli_engine.kernels.word_attention import word_attention as triton_forward
from tli_engine.kernels.word_attention_backward import backward_tile, launch_backward
from tli_engine.kernels.word_attention_backward import word_attention_backward as triton_backward

OPS = torch.ops.tli_engine
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WORDS = [  # lengths, Hq, Hkv, D
    pytest.param([1], 1, 1, 64, id="one-token"),
    pytest.param([1] * 5, 3, 1, 64, id="single-tokens"),
    pytest.param([7], 4, 4, 16, id="one-word"),
    pytest.param([3, 5, 2, 8, 1, 4, 7], 4, 1, 128, id="short-words"),
    pytest.param([16], 2, 2, 64, id="a-full-tile"),
    pytest.param([15, 17, 2], 3, 1, 96, id="across-a-tile"),
    pytest.param([2, 90, 1, 3], 4, 2, 32, id="across-many-tiles"),
    pytest.param([3, 4, 6], 9, 1, 80, id="more-heads-than-a-program-takes"),
    pytest.param([5, 18], 2, 1, 256, id="wide-heads"),
]


def make_bounds(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
    return word_bounds(offsets.to(torch.int32), sum(lengths))


def make_inputs(
    T: int,
    heads: int,
    kv_heads: int,
    D: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Views of one projection, and angles that differ from row to row."""
    total = heads + 2 * kv_heads
    qkv = torch.randn(T, total * D, device=device).to(dtype)
    q, k, v = qkv.view(T, total, D).split([heads, kv_heads, kv_heads], dim=1)
    angles = torch.rand(T, D // 2, device=device) * 6
    return q, k, v, angles.cos(), angles.sin()


def plain(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, bounds: Tensor) -> Tensor:
    """transformers' rotation and PyTorch's attention under a block mask, in the inputs' dtype."""
    wide = (torch.cat([x, x], dim=-1).to(q.dtype)[None] for x in (cos, sin))
    rotated = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], *wide)
    rows = torch.arange(len(q), device=q.device)
    mask = (rows[None, :] >= bounds[0][:, None]) & (rows[None, :] <= rows[:, None])
    out = torch.nn.functional.scaled_dot_product_attention(
        *rotated, v.transpose(0, 1)[None], attn_mask=mask, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def plain_with_gradients(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, bounds: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = plain(*leaves, cos, sin, bounds)
    return out.detach(), torch.cat(torch.autograd.grad(out, leaves, dout.to(out.dtype)), dim=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lengths", "heads", "kv_heads", "D"), WORDS)
def test_kernels_err_no_more_than_plain_torch(
    lengths: list[int], heads: int, kv_heads: int, D: int, dtype: torch.dtype, device: torch.device
) -> None:
    bounds = make_bounds(lengths, device)
    inputs = make_inputs(sum(lengths), heads, kv_heads, D, dtype, device)
    dout = torch.randn(sum(lengths), heads, D, device=device).to(dtype)
    out, lse = triton_forward(*inputs, bounds, D**-0.5)
    dqkv = triton_backward(dout, *inputs, bounds, out, lse, D**-0.5)
    same, d_same = plain_with_gradients(*inputs, bounds, dout)
    exact, d_exact = plain_with_gradients(*(x.double() for x in inputs), bounds, dout)
    assert out.is_contiguous()
    assert_within_error_budget(out, same, exact)
    assert_within_error_budget(dqkv, d_same, d_exact, floor=2e-6)


@pytest.mark.parametrize(("lengths", "heads", "kv_heads", "D"), WORDS)
def test_reference_is_attention_under_a_block_mask(
    lengths: list[int], heads: int, kv_heads: int, D: int
) -> None:
    bounds = make_bounds(lengths)
    q, k, v, cos, sin = make_inputs(sum(lengths), heads, kv_heads, D, torch.float64)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    dout = torch.randn_like(q)
    out = word_attention(*leaves, cos, sin, bounds)
    grads = torch.cat(torch.autograd.grad(out, leaves, dout), dim=1)
    expected, d_expected = plain_with_gradients(q, k, v, cos.double(), sin.double(), bounds, dout)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads, d_expected, rtol=1e-12, atol=1e-12)


def test_log_sum_exp_is_that_of_the_scores(device: torch.device) -> None:
    bounds = make_bounds([3, 40, 1], device)
    q, k, v, cos, sin = make_inputs(44, 2, 1, 64, torch.float32, device)
    scores = torch.einsum("nhd,md->hnm", rotate(q, cos, sin), rotate(k, cos, sin)[:, 0]) / 8
    rows = torch.arange(44, device=device)
    hidden = (rows[None, :] < bounds[0][:, None]) | (rows[None, :] > rows[:, None])
    expected = scores.masked_fill(hidden, -torch.inf).logsumexp(-1).T
    for forward in (triton_forward, OPS.word_attention.default):
        torch.testing.assert_close(forward(q, k, v, cos, sin, bounds, 0.125)[1], expected)


@pytest.mark.parametrize(
    "tile",
    [Tile(16, 16, 1, 4), Tile(16, 64, 2, 4), Tile(32, 32, 4, 8), Tile(32, 64, 1, 4)],
    ids=str,
)
def test_tile_changes_rounding_at_most(tile: Tile, device: torch.device) -> None:
    bounds = make_bounds([6, 37, 1, 9, 4], device)
    inputs = make_inputs(57, 3, 1, 32, torch.float32, device)
    dout = torch.randn(57, 3, 32, device=device)
    out, lse = triton_forward(*inputs, bounds, 0.2)
    other, other_lse = launch_forward(*inputs, bounds, 0.2, tile)
    torch.testing.assert_close(other, out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other_lse, lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        launch_backward(dout, *inputs, bounds, out, lse, 0.2, tile),
        triton_backward(dout, *inputs, bounds, out, lse, 0.2),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("choose", [forward_tile, backward_tile])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 48])
def test_window_holds_the_step(choose: Any, dtype: torch.dtype, D: int, group: int) -> None:
    """The first turn has to meet the tile's own rows."""
    tile = choose(D, group, dtype)
    assert tile.window >= tile.step
    assert all(n & (n - 1) == 0 for n in tile)


def test_rows_not_asked_for_are_not_read(device: torch.device) -> None:
    """Memory past the last row, and between the rows of a view, may be anything."""
    bounds = make_bounds([4, 3], device)
    inputs = make_inputs(7, 2, 1, 64, torch.float16, device)
    padded = []
    for x in inputs:
        room = torch.full((40, *x.shape[1:-1], x.shape[-1] + 8), torch.nan, device=device)
        padded.append(room.to(x.dtype)[:7, ..., : x.shape[-1]])
        padded[-1].copy_(x)
        assert with_dense_rows(padded[-1]) is padded[-1]
    out, lse = triton_forward(*inputs, bounds, 0.1)
    assert torch.equal(triton_forward(*padded, bounds, 0.1)[0], out)
    dout = torch.randn_like(out)
    assert torch.equal(
        triton_backward(dout, *padded, bounds, out, lse, 0.1),
        triton_backward(dout, *inputs, bounds, out, lse, 0.1),
    )


def test_is_deterministic_bit_for_bit(device: torch.device) -> None:
    bounds = make_bounds([2, 33, 5], device)
    inputs = make_inputs(40, 6, 2, 64, torch.bfloat16, device)
    out, lse = triton_forward(*inputs, bounds, 0.125)
    again, lse_again = triton_forward(*inputs, bounds, 0.125)
    assert torch.equal(out, again)
    assert torch.equal(lse, lse_again)
    arguments = (torch.randn_like(out), *inputs, bounds, out, lse, 0.125)
    assert torch.equal(triton_backward(*arguments), triton_backward(*arguments))


@pytest.mark.parametrize("shape", [(6, 2, 64), (1, 1, 64)], ids=str)
def test_inputs_of_any_stride(shape: tuple[int, ...], device: torch.device) -> None:
    bounds = make_bounds([shape[0]], device)
    q, k, v, cos, sin = make_inputs(shape[0], shape[1], shape[1], 64, torch.float32, device)
    strided = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in (q, k, v, cos, sin)]
    out, lse = triton_forward(q, k, v, cos, sin, bounds, 0.1)
    assert torch.equal(triton_forward(*strided, bounds, 0.1)[0], out)
    # the gradient of a sum has no strides at all
    ones = torch.ones((), device=device).expand(out.shape)
    dense = triton_backward(ones.contiguous(), q, k, v, cos, sin, bounds, out, lse, 0.1)
    assert torch.equal(triton_backward(ones, *strided, bounds, out, lse, 0.1), dense)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_gradient(kv_heads: int) -> None:
    bounds = make_bounds([3, 1, 2])
    *qkv, cos, sin = make_inputs(6, 4, kv_heads, 6, torch.float64)
    leaves = [x.detach().requires_grad_() for x in qkv]
    assert torch.autograd.gradcheck(lambda *x: word_attention(*x, cos, sin, bounds), leaves)


def test_gradients_asked_for_one_by_one(device: torch.device) -> None:
    bounds = make_bounds([3, 4], device)
    *qkv, cos, sin = make_inputs(7, 2, 1, 64, torch.float32, device)
    leaves = [x.detach().requires_grad_() for x in qkv]
    grads = torch.autograd.grad(word_attention(*leaves, cos, sin, bounds).sum(), leaves)
    for i, expected in enumerate(grads):
        alone = [x.detach().requires_grad_(i == j) for j, x in enumerate(qkv)]
        out = word_attention(*alone, cos, sin, bounds)
        (grad,) = torch.autograd.grad(out.sum(), alone[i])
        assert torch.equal(grad, expected)


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    half=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_a_word_is_attended_to_as_if_alone(
    lengths: list[int], heads: tuple[int, int], half: int, seed: int
) -> None:
    torch.manual_seed(seed)
    inputs = make_inputs(sum(lengths), *heads, 2 * half, torch.float64)
    out = word_attention(*inputs, make_bounds(lengths))
    start = 0
    for n in lengths:
        alone = word_attention(*(x[start : start + n] for x in inputs), make_bounds([n]))
        torch.testing.assert_close(out[start : start + n], alone, rtol=1e-12, atol=1e-12)
        start += n


def test_angles_may_be_given_twice_over(device: torch.device) -> None:
    q, k, v, cos, sin = make_inputs(5, 2, 1, 64, torch.float32, device)
    bounds = make_bounds([5], device)
    twice = (torch.cat([x, x], dim=-1) for x in (cos, sin))
    expected = word_attention(q, k, v, cos, sin, bounds)
    assert torch.equal(word_attention(q, k, v, *twice, bounds), expected)
    assert torch.equal(word_attention(q, k, v, cos, sin, bounds, scale=0.125), expected)
    assert not torch.equal(word_attention(q, k, v, cos, sin, bounds, scale=0.5), expected)


def test_bounds_of_words() -> None:
    expected = torch.tensor([[0, 0, 2, 3, 3, 3], [2, 2, 3, 6, 6, 6]], dtype=torch.int32)
    for dtype in (torch.int32, torch.int64):
        # the third word is empty
        assert torch.equal(word_bounds(torch.tensor([0, 2, 3, 3, 6], dtype=dtype), 6), expected)
    assert word_bounds(torch.tensor([0]), 0).shape == (2, 0)
    assert [rows.tolist() for rows in words_by_length(expected)] == [[[2]], [[0, 1]], [[3, 4, 5]]]


def test_no_tokens(device: torch.device) -> None:
    bounds = word_bounds(torch.zeros(1, dtype=torch.int32, device=device), 0)
    inputs = make_inputs(0, 4, 2, 64, torch.bfloat16, device)
    for forward in (triton_forward, OPS.word_attention.default):
        out, lse = forward(*inputs, bounds, 0.125)
        assert out.shape == (0, 4, 64)
        assert lse.shape == (0, 4)
        for backward in (triton_backward, OPS.word_attention_backward.default):
            assert backward(out, *inputs, bounds, out, lse, 0.125).shape == (0, 8, 64)


@pytest.mark.parametrize("lengths", [[1], [2, 3]], ids=str)
def test_operator_contract(lengths: list[int], device: torch.device) -> None:
    bounds = make_bounds(lengths, device)
    *qkv, cos, sin = make_inputs(sum(lengths), 4, 2, 16, torch.float32, device)
    leaves = [x.detach().requires_grad_() for x in qkv]
    torch.library.opcheck(OPS.word_attention.default, (*leaves, cos, sin, bounds, 0.25))
    out, lse = OPS.word_attention.default(*qkv, cos, sin, bounds, 0.25)
    arguments = (torch.randn_like(out), *qkv, cos, sin, bounds, out, lse, 0.25)
    torch.library.opcheck(OPS.word_attention_backward.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic: bool, device: torch.device) -> None:
    torch.compiler.reset()
    compiled = torch.compile(word_attention, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lengths in ([3, 2], [4, 1, 2]):
        bounds = make_bounds(lengths, device)
        *qkv, cos, sin = make_inputs(sum(lengths), 4, 2, 16, torch.float32, device)
        leaves = [x.detach().requires_grad_() for x in qkv]
        results, grads = [], []
        for function in (compiled, word_attention):
            results.append(function(*leaves, cos, sin, bounds))
            grads.append(torch.autograd.grad(results[-1].square().sum(), leaves))
        torch.testing.assert_close(*results, rtol=0, atol=0)
        torch.testing.assert_close(*grads, rtol=0, atol=0)


Q, K, C, B = torch.zeros(3, 4, 8), torch.zeros(3, 2, 8), torch.zeros(3, 8), make_bounds([3])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(
            lambda: word_attention(Q[0], K, K, C, C, B),
            r"q must be \[T, Hq, D\] with an even D, got \[4, 8\]",
            id="q-flat",
        ),
        pytest.param(
            lambda: word_attention(Q[..., :7], K[..., :7], K[..., :7], C, C, B),
            r"with an even D, got \[3, 4, 7\]",
            id="odd",
        ),
        pytest.param(
            lambda: word_attention(Q, K[:2], K, C, C, B),
            r"k must be \[3, Hkv, 8\], got \[2, 2, 8\]",
            id="k-rows",
        ),
        pytest.param(
            lambda: word_attention(Q, K[:, :1].expand(3, 3, 8), K, C, C, B),
            "heads of k must divide the 4 of q, got 3",
            id="groups",
        ),
        pytest.param(
            lambda: word_attention(Q, K, K[:, :1], C, C, B),
            r"v must be \[3, 2, 8\] as k, got \[3, 1, 8\]",
            id="v",
        ),
        pytest.param(
            lambda: word_attention(Q, K.half(), K, C, C, B),
            "q, k and v must share a floating-point dtype, got torch.float32, torch.float16",
            id="dtypes",
        ),
        pytest.param(
            lambda: word_attention(Q, K, K, C[:, :3], C, B),
            r"cos must be \[3, 8\] or \[3, 4\], got \[3, 3\]",
            id="cos",
        ),
        pytest.param(
            lambda: word_attention(Q, K, K, C, C.int(), B),
            "sin must be floating point, got torch.int32",
            id="sin-dtype",
        ),
        pytest.param(
            lambda: word_attention(Q, K, K, C, C, B.long()),
            r"bounds must be torch.int32 \[2, 3\], got torch.int64 \[2, 3\]",
            id="bounds-dtype",
        ),
        pytest.param(
            lambda: word_attention(Q, K, K, C, C, B[0]),
            r"bounds must be torch.int32 \[2, 3\], got torch.int32 \[3\]",
            id="bounds-shape",
        ),
        pytest.param(
            lambda: word_attention(Q, K, K, C, C.to("meta"), B),
            "sin must be on cpu as q, got meta",
            id="device",
        ),
        pytest.param(
            lambda: word_bounds(torch.zeros(2, 2, dtype=torch.int64), 3),
            r"offsets must be \[S \+ 1\], got \[2, 2\]",
            id="offsets-shape",
        ),
        pytest.param(
            lambda: word_bounds(torch.zeros(2), 3),
            "offsets must be int32 or int64, got torch.float32",
            id="offsets-dtype",
        ),
        pytest.param(
            lambda: word_bounds(torch.zeros(1, dtype=torch.int64), 3),
            "offsets of no word, but 3 tokens",
            id="offsets-of-nothing",
        ),
    ],
)
def test_wrong_argument_is_named_in_the_error(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
