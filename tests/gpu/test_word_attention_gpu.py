"""Attention within words on a GPU: the op and its gradients against plain PyTorch in fp64."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tli_engine import backends
from tli_engine.ops import word_attention, word_bounds
from tli_engine.testing import assert_graph_gives_the_bits, assert_within_error_budget

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SHORT = [3, 5, 2, 8, 1, 4, 7, 6, 2, 2, 3]
CASES = [  # lengths, Hq, Hkv, D
    pytest.param([1], 32, 8, 128, id="one-token"),
    pytest.param(SHORT * 6, 32, 8, 128, id="8B"),
    pytest.param(SHORT * 3, 64, 8, 128, id="72B"),
    pytest.param(SHORT * 3, 9, 3, 64, id="SmolLM2"),
    pytest.param(SHORT, 28, 4, 128, id="group-of-7"),
    pytest.param(SHORT, 4, 1, 256, id="D-256"),
    pytest.param(SHORT, 6, 6, 96, id="D-96"),
    pytest.param(SHORT, 8, 8, 80, id="D-80"),
    pytest.param(SHORT, 4, 2, 8, id="D-8"),
    pytest.param([16, 17, 15, 33, 1], 8, 2, 64, id="across-tiles"),
    pytest.param([5, 700, 2, 90], 4, 2, 128, id="across-many-tiles"),
]


def make_bounds(lengths: Sequence[int]) -> Tensor:
    return word_bounds(torch.tensor([0, *lengths], device="cuda").cumsum(0), sum(lengths))


def make_inputs(
    T: int, heads: int, kv_heads: int, D: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    qkv = torch.randn(T, heads + 2 * kv_heads, D, device="cuda").to(dtype)
    angles = (torch.rand(T, D // 2, device="cuda") * 6).repeat(1, 2)
    # as a model hands them over: in the dtype of its activations
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return *qkv.split([heads, kv_heads, kv_heads], dim=1), cos, sin


def plain(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, bounds: Tensor) -> Tensor:
    """Rotation and attention under a block mask, in the inputs' dtype."""

    def rotate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat([-b, a], dim=-1) * sin[:, None]

    group = q.shape[1] // k.shape[1]
    q, k, v = rotate(q), rotate(k).repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    rows = torch.arange(len(q), device=q.device)
    hidden = (rows[None, :] < bounds[0][:, None]) | (rows[None, :] > rows[:, None])
    scores = torch.einsum("nhd,mhd->hnm", q, k) * q.shape[2] ** -0.5
    p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hnm,mhd->nhd", p, v)


def with_gradients(
    attention: object, inputs: Sequence[Tensor], bounds: Tensor, dout: Tensor
) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out = attention(*leaves, *inputs[3:], bounds)  # type: ignore[operator]
    return out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("lengths", "heads", "kv_heads", "D"), CASES)
def test_attention_and_its_gradients(
    lengths: list[int], heads: int, kv_heads: int, D: int, dtype: torch.dtype
) -> None:
    assert backends.explain("word_attention") == ("triton", ())
    assert backends.explain("word_attention_backward") == ("triton", ())
    bounds = make_bounds(lengths)
    inputs = make_inputs(sum(lengths), heads, kv_heads, D, dtype)
    dout = torch.randn(sum(lengths), heads, D, device="cuda").to(dtype)
    actual = with_gradients(word_attention, inputs, bounds, dout)
    same = with_gradients(plain, inputs, bounds, dout)
    exact = with_gradients(plain, [x.double() for x in inputs], bounds, dout)
    for got, baseline, truth in zip(actual, same, exact, strict=True):
        assert_within_error_budget(got, baseline, truth, floor=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_is_deterministic_and_replays_from_a_graph(dtype: torch.dtype) -> None:
    bounds = make_bounds([*SHORT, 40])
    inputs = make_inputs(len(bounds[0]), 32, 8, 128, dtype)
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    dout = torch.randn_like(inputs[0])

    def step() -> tuple[Tensor, ...]:
        out = word_attention(*leaves, *inputs[3:], bounds)
        return out, *torch.autograd.grad(out, leaves, dout)

    captured, graph = assert_graph_gives_the_bits(step, repeats=20)
    first = captured[0].clone()
    # the words are read in the graph: other ones give another result
    bounds.copy_(make_bounds([2] * (len(bounds[0]) // 2) + [1] * (len(bounds[0]) % 2)))
    graph.replay()
    torch.cuda.synchronize()
    assert not torch.equal(captured[0], first)
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_offsets_past_2_to_the_31() -> None:
    T, heads, kv_heads, D = 360_000, 32, 8, 128
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB")
    bounds = make_bounds([4] * (T // 4))
    inputs = make_inputs(T, heads, kv_heads, D, torch.bfloat16)
    assert T * inputs[0].stride(0) > 1 << 31
    out, lse = torch.ops.tli_engine.word_attention.default(
        *inputs[:3], *(x[:, : D // 2] for x in inputs[3:]), bounds, D**-0.5
    )
    dqkv = torch.ops.tli_engine.word_attention_backward.default(
        out, *inputs[:3], *(x[:, : D // 2] for x in inputs[3:]), bounds, out, lse, D**-0.5
    )
    last = [x[-64:] for x in inputs]
    expected = with_gradients(word_attention, last, make_bounds([4] * 16), out[-64:])
    assert torch.equal(out[-64:], expected[0])
    assert torch.equal(dqkv[-64:], torch.cat(expected[1:], dim=1))


@pytest.mark.parametrize(
    ("D", "dtype"), [(64, torch.float64), (320, torch.bfloat16)], ids=["fp64", "D-320"]
)
def test_what_no_kernel_takes_is_named_in_the_error(D: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(3, 2, 1, D, dtype)
    with pytest.raises(
        ValueError, match="on a GPU q must be bf16, fp16 or fp32 with D at most 256"
    ):
        word_attention(*inputs, make_bounds([3]))


def test_no_tokens() -> None:
    inputs = make_inputs(0, 32, 8, 128, torch.bfloat16)
    empty = make_bounds([])
    out, *grads = with_gradients(word_attention, inputs, empty, inputs[0])
    assert out.shape == (0, 32, 128)
    assert [g.shape[1] for g in grads] == [32, 8, 8]


def test_operator_contract() -> None:
    *qkv, cos, sin = make_inputs(5, 4, 2, 64, torch.bfloat16)
    leaves = [x.detach().requires_grad_() for x in qkv]
    arguments = (*leaves, cos[:, :32], sin[:, :32], make_bounds([2, 3]), 0.125)
    torch.library.opcheck(torch.ops.tli_engine.word_attention.default, arguments)
