"""The norm of a sum on a GPU: the op and its gradients against transformers and fp64."""

import pytest
import torch
from torch import Tensor

from tli_engine import backends
from tli_engine.ops import add_rms_norm
from tli_engine.testing import assert_graph_gives_the_bits, assert_within_error_budget

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
EPS = 1e-5
SHAPES = [  # T, D
    pytest.param(1, 4096, id="one-row"),
    pytest.param(64, 4096, id="8B"),
    pytest.param(257, 8192, id="72B"),
    pytest.param(1025, 4096, id="many-rows"),
    pytest.param(3000, 8192, id="many-wide-rows"),
    pytest.param(130, 576, id="D-576"),
    pytest.param(5000, 640, id="D-640"),
    pytest.param(77, 1536, id="D-1536"),
    pytest.param(300, 3584, id="D-3584"),
    pytest.param(40, 16384, id="D-16384"),
    pytest.param(9, 100, id="D-100"),
    pytest.param(3, 1, id="D-1"),
]


def make_inputs(T: int, D: int, dtype: torch.dtype) -> list[Tensor]:
    x, residual = (torch.randn(T, D, device="cuda").to(dtype) for _ in range(2))
    return [x, residual, (torch.randn(D, device="cuda") * 0.5).to(dtype)]


def plain(x: Tensor, residual: Tensor, weight: Tensor, plus_one: bool) -> tuple[Tensor, Tensor]:
    """The lines of transformers' norms; fp64 stays fp64."""
    h = x + residual
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    if plus_one:
        return (normed * (1 + weight.to(wide.dtype))).to(h.dtype), h
    return weight * normed.to(h.dtype), h


def with_gradients(
    norm: object, inputs: list[Tensor], dy: Tensor, dh: Tensor, plus_one: bool
) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    y, h = norm(*leaves, plus_one)  # type: ignore[operator]
    grads = torch.autograd.grad((y, h), leaves, (dy.to(y.dtype), dh.to(y.dtype)))
    return [y.detach(), h.detach(), *grads]


def ours(x: Tensor, residual: Tensor, weight: Tensor, plus_one: bool) -> tuple[Tensor, Tensor]:
    return add_rms_norm(x, residual, weight, EPS, plus_one=plus_one)


@pytest.mark.parametrize("plus_one", [False, True], ids=["llama", "gemma"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("T", "D"), SHAPES)
def test_norm_and_its_gradients(T: int, D: int, dtype: torch.dtype, plus_one: bool) -> None:
    assert backends.explain("add_rms_norm") == ("triton", ())
    assert backends.explain("add_rms_norm_backward") == ("triton", ())
    inputs = make_inputs(T, D, dtype)
    dy, dh = (torch.randn(T, D, device="cuda").to(dtype) for _ in range(2))
    actual = with_gradients(ours, inputs, dy, dh, plus_one)
    same = with_gradients(plain, inputs, dy, dh, plus_one)
    exact = with_gradients(plain, [t.double() for t in inputs], dy, dh, plus_one)
    assert torch.equal(actual[1], same[1])
    # the weight's gradient is a sum of T terms
    floors = (1e-5, 1e-5, 1e-5, 1e-5, 1e-4)
    for got, baseline, truth, floor in zip(actual, same, exact, floors, strict=True):
        assert_within_error_budget(got, baseline, truth, floor=floor)
    # a frozen weight takes another way through the backward
    x, residual = (t.detach().requires_grad_() for t in inputs[:2])
    frozen = torch.autograd.grad(ours(x, residual, inputs[2], plus_one), (x, residual), (dy, dh))
    for got in frozen:
        assert_within_error_budget(got, same[2], exact[2], floor=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("T", [64, 2000])
def test_without_a_residual(T: int, dtype: torch.dtype) -> None:
    x, _, weight = make_inputs(T, 4096, dtype)
    dy = torch.randn_like(x)
    leaf = x.detach().requires_grad_()
    y, h = add_rms_norm(leaf, None, weight, EPS)
    assert h is leaf
    (dx,) = torch.autograd.grad(y, leaf, dy)
    zeros = torch.zeros_like(x)
    same = with_gradients(plain, [x, zeros, weight], dy, zeros, False)
    wide = [t.double() for t in (x, zeros, weight)]
    exact = with_gradients(plain, wide, dy, zeros, False)
    assert_within_error_budget(y.detach(), same[0], exact[0])
    assert_within_error_budget(dx, same[2], exact[2], floor=1e-5)


@pytest.mark.parametrize("T", [64, 2000])
def test_is_deterministic_and_replays_from_a_graph(T: int) -> None:
    leaves = [t.requires_grad_() for t in make_inputs(T, 4096, torch.bfloat16)]
    dy, dh = torch.randn_like(leaves[0]), torch.randn_like(leaves[0])

    def step() -> list[Tensor]:
        y, h = add_rms_norm(*leaves, EPS)
        # in a chain: each launch may be set up before the one it depends on has ended
        for _ in range(8):
            y, h = add_rms_norm(y, h, leaves[2], EPS)
        return [y, h, *torch.autograd.grad((y, h), leaves, (dy, dh))]

    assert_graph_gives_the_bits(step)


def test_a_chain_of_launches_sees_what_was_written_before() -> None:
    x, residual, weight = make_inputs(512, 8192, torch.bfloat16)
    results = []
    for wait in (False, True):
        y, h = x, residual
        for _ in range(40):
            y, h = add_rms_norm(y, h, weight, EPS)
            if wait:
                torch.cuda.synchronize()
        results.append((y, h))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_rows_of_views() -> None:
    x, residual, weight = make_inputs(40, 576, torch.bfloat16)
    room = torch.full((40, 2 * 600), torch.nan, device="cuda").bfloat16()
    views = [room[:, 8:584], room[:, 608:1184]]
    for view, dense in zip(views, (x, residual), strict=True):
        view.copy_(dense)
    dy, dh = torch.randn_like(x), torch.randn_like(x)
    dense = with_gradients(ours, [x, residual, weight], dy, dh, False)
    strided = with_gradients(ours, [*views, weight], dy, dh, False)
    assert all(torch.equal(a, b) for a, b in zip(dense, strided, strict=True))
    # the gradient of a sum has no strides at all
    leaf = x.detach().requires_grad_()
    y, h = add_rms_norm(leaf, residual, weight, EPS)
    (grad,) = torch.autograd.grad(y.sum() + h.sum(), leaf)
    ones = torch.ones_like(x)
    assert torch.equal(grad, with_gradients(ours, [x, residual, weight], ones, ones, False)[2])


def test_offsets_past_2_to_the_31() -> None:
    T, D = 270_000, 8192
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB")
    x = torch.randn(T, D, device="cuda", dtype=torch.bfloat16)
    weight = torch.rand(D, device="cuda", dtype=torch.bfloat16)
    op, backward = (
        torch.ops.tli_engine.add_rms_norm.default,
        torch.ops.tli_engine.add_rms_norm_backward.default,
    )
    y, h, rstd = op(x, x, weight, EPS, False)
    # as many rows as take the same tile
    last = x[-2000:]
    y_last, h_last, rstd_last = op(last, last, weight, EPS, False)
    for whole, part in ((y, y_last), (h, h_last), (rstd, rstd_last)):
        assert torch.equal(whole[-2000:], part)
    dx = backward(y, x, h, rstd, weight, False, False)[0]
    expected = backward(y_last, last, h_last, rstd_last, weight, False, False)[0]
    assert torch.equal(dx[-2000:], expected)


@pytest.mark.parametrize(
    ("D", "dtype", "message"),
    [
        pytest.param(64, torch.float64, "x must be bf16, fp16 or fp32 on a GPU", id="fp64"),
        pytest.param(16385, torch.bfloat16, "D of at most 16384, got 16385", id="wide"),
    ],
)
def test_what_no_kernel_takes_is_named_in_the_error(
    D: int, dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        add_rms_norm(*make_inputs(3, D, dtype), EPS)


def test_no_rows() -> None:
    leaves = [t.requires_grad_() for t in make_inputs(0, 4096, torch.bfloat16)]
    y, h = add_rms_norm(*leaves, EPS)
    assert y.shape == h.shape == (0, 4096)
    grads = torch.autograd.grad((y, h), leaves, (y, h))
    assert [g.shape for g in grads] == [t.shape for t in leaves]
    assert (grads[2] == 0).all()


def test_operator_contract() -> None:
    leaves = [t.requires_grad_() for t in make_inputs(5, 64, torch.bfloat16)]
    torch.library.opcheck(torch.ops.tli_engine.add_rms_norm.default, (*leaves, EPS, True))
