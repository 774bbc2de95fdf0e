import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tli_engine import segment_mean
from tli_engine.reference.segment_mean import segment_mean as reference
from tli_engine.reference.segment_mean_backward import segment_mean_backward as reference_backward
from tli_engine.testing import assert_within_error_budget

pytest.importorskip("triton")
from tli_engine.kernels.segment_mean import segment_mean as triton_forward
from tli_engine.kernels.segment_mean_backward import segment_mean_backward as triton_backward

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LENGTHS = [
    pytest.param([1], id="one-token"),
    pytest.param([1, 1, 1], id="tokens-alone"),
    pytest.param([3, 1, 7, 2], id="ragged"),
    pytest.param([0, 2, 0, 0, 5, 0], id="empty-segments"),
    pytest.param([64, 64], id="even"),
    pytest.param([100], id="long"),
    pytest.param([], id="no-segments"),
    pytest.param([0, 0], id="no-rows"),
]


def make_inputs(
    lengths: list[int], dtype: torch.dtype, device: torch.device, D: int = 24
) -> tuple[Tensor, Tensor, Tensor]:
    T = sum(lengths)
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
    x = torch.randn(T, D, device=device).to(dtype)
    return x, torch.rand(T, device=device) + 0.1, offsets


def naive(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """The definition, segment by segment, in fp64."""
    means = torch.zeros(len(offsets) - 1, x.shape[1], dtype=torch.float64, device=x.device)
    for s, (start, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        w = weight[start:end].double()
        if w.sum() > 0:
            means[s] = (x[start:end].double() * w[:, None]).sum(0) / w.sum()
    return means


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_is_within_the_error_of_plain_torch(
    lengths: list[int], dtype: torch.dtype, device: torch.device
) -> None:
    x, weight, offsets = make_inputs(lengths, dtype, device)
    actual = segment_mean(x, weight, offsets)
    assert actual.dtype == torch.float32
    assert actual.is_contiguous()
    assert actual.shape == (len(lengths), x.shape[1])
    if not sum(lengths):
        assert (actual == 0).all()
        return
    plain = reference(x, weight, offsets)
    assert_within_error_budget(actual, plain, naive(x, weight, offsets))
    # the oracle itself: fp32 sums of n terms of size 1 are exact to n units in the last place
    bound = 2**-23 * (max(lengths) + 2) * x.abs().max().item()
    assert (plain.double() - naive(x, weight, offsets)).abs().max().item() <= bound


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 6), max_size=8),
    zeroed=st.lists(st.integers(0, 40), max_size=12),
    seed=st.integers(0, 2**31),
)
def test_equals_the_definition_for_any_segments(
    lengths: list[int], zeroed: list[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    T = sum(lengths)
    x = torch.randn(T, 3, generator=generator, dtype=torch.float64)
    weight = torch.rand(T, generator=generator, dtype=torch.float64)
    weight[[row for row in zeroed if row < T]] = 0
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    torch.testing.assert_close(
        segment_mean(x, weight, offsets), naive(x, weight, offsets), rtol=1e-12, atol=1e-12
    )


def test_zero_weight_leaves_a_row_out(device: torch.device) -> None:
    x, weight, offsets = make_inputs([4, 3], torch.float32, device)
    weight[1] = 0
    kept = torch.tensor([0, 2, 3, 4, 5, 6], device=device)
    without = segment_mean(x[kept], weight[kept], torch.tensor([0, 3, 6], device=device))
    torch.testing.assert_close(segment_mean(x, weight, offsets), without, rtol=0, atol=1e-6)


def test_a_segment_of_no_weight_is_zero(device: torch.device) -> None:
    x, weight, offsets = make_inputs([2, 3, 0, 2], torch.float32, device)
    weight[2:5] = 0
    means = segment_mean(x, weight, offsets)
    assert (means[1:3] == 0).all()
    assert (means[[0, 3]] != 0).all()


def test_result_does_not_depend_on_the_scale_of_the_weights(device: torch.device) -> None:
    x, weight, offsets = make_inputs([5, 3], torch.float32, device)
    torch.testing.assert_close(
        segment_mean(x, weight * 4, offsets), segment_mean(x, weight, offsets), rtol=0, atol=1e-6
    )


def test_fp64_stays_fp64(device: torch.device) -> None:
    x, weight, offsets = make_inputs([2, 3], torch.float64, device)
    actual = segment_mean(x, weight, offsets)
    assert actual.dtype == torch.float64
    expected = naive(x, weight, offsets)
    torch.testing.assert_close(actual, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs(dtype: torch.dtype, device: torch.device) -> None:
    x, weight, offsets = make_inputs([3, 1, 4], dtype, device)
    expected = segment_mean(x, weight, offsets)
    strided = (
        x.T.contiguous().T,
        torch.stack([weight, torch.full_like(weight, torch.nan)], 1)[:, 0],
        torch.stack([offsets, offsets + 99], 1)[:, 0],
    )
    assert not any(t.is_contiguous() for t in strided)
    torch.testing.assert_close(segment_mean(*strided), expected, rtol=0, atol=0)


def test_is_deterministic_bit_for_bit(device: torch.device) -> None:
    inputs = make_inputs([70, 3, 200], torch.bfloat16, device)
    assert torch.equal(segment_mean(*inputs), segment_mean(*inputs))


@pytest.mark.parametrize("lengths", LENGTHS[:-3])
def test_gradient(lengths: list[int], device: torch.device) -> None:
    x, weight, offsets = make_inputs(lengths, torch.float64, device, D=3)
    if len(weight) > 1:
        weight[0] = 0
    assert torch.autograd.gradcheck(segment_mean, (x.requires_grad_(), weight, offsets))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_keeps_the_dtype_of_the_rows(dtype: torch.dtype, device: torch.device) -> None:
    x, weight, offsets = make_inputs([2, 0, 5], dtype, device)
    dmean = torch.randn(3, x.shape[1], device=device)
    (dx,) = torch.autograd.grad(segment_mean(x.requires_grad_(), weight, offsets), x, dmean)
    exact_x = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(naive(exact_x, weight, offsets), exact_x, dmean.double())
    assert dx.dtype == dtype
    # one rounding to the dtype
    bound = torch.finfo(dtype).eps * exact.abs().max().item()
    assert (dx.double() - exact).abs().max().item() <= bound


def test_gradient_of_rows_without_weight_is_zero(device: torch.device) -> None:
    x, weight, offsets = make_inputs([2, 3], torch.float32, device)
    weight[:2] = 0
    segment_mean(x.requires_grad_(), weight, offsets).sum().backward()
    assert x.grad is not None
    assert (x.grad[:2] == 0).all()
    assert (x.grad[2:] > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("lengths", [[3, 0, 2], [1], []], ids=str)
def test_operator_contract(lengths: list[int], dtype: torch.dtype, device: torch.device) -> None:
    """Schema, fake tensors, autograd registration and AOT dispatch agree with the op."""
    x, weight, offsets = make_inputs(lengths, dtype, device)
    args = (x.requires_grad_(), weight, offsets)
    torch.library.opcheck(torch.ops.tli_engine.segment_mean.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic: bool, device: torch.device) -> None:
    torch.compiler.reset()
    compiled = torch.compile(segment_mean, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lengths in ([3, 1, 4], [2, 5]):
        x, weight, offsets = make_inputs(lengths, torch.float32, device)
        results, grads = [], []
        for function in (compiled, segment_mean):
            leaf = x.clone().requires_grad_()
            results.append(function(leaf, weight, offsets))
            grads.append(torch.autograd.grad(results[-1].square().sum(), leaf)[0])
        torch.testing.assert_close(*results, rtol=0, atol=0)
        torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            {"x": torch.zeros(7)}, r"x must be \[T, D\] and weight \[T\], got .*7", id="x-vector"
        ),
        pytest.param(
            {"weight": torch.ones(6)}, r"got torch.Size\(\[7, 24\]\) and .*\[6\]", id="short"
        ),
        pytest.param(
            {"weight": torch.ones(7, dtype=torch.bool)},
            "weight must be floating point, got torch.bool",
            id="bool-weight",
        ),
        pytest.param(
            {"offsets": torch.tensor([0, 3, 7], dtype=torch.int32)},
            r"offsets must be int64 \[S \+ 1\], got torch.int32",
            id="int32-offsets",
        ),
        pytest.param(
            {"offsets": torch.tensor([[0, 7]])}, r"offsets must be int64 .*\[1, 2\]", id="matrix"
        ),
        pytest.param(
            {"offsets": torch.empty(0, dtype=torch.int64)},
            r"offsets must be int64 .*\[0\]",
            id="no-offsets",
        ),
    ],
)
def test_wrong_argument_is_named_in_the_error(
    change: dict[str, Tensor], message: str, device: torch.device
) -> None:
    inputs = dict(
        zip(("x", "weight", "offsets"), make_inputs([3, 4], torch.float32, device), strict=True)
    )
    with pytest.raises(ValueError, match=message):
        segment_mean(**inputs | {name: t.to(device) for name, t in change.items()})


def test_a_row_of_no_weight_may_be_infinite(device: torch.device) -> None:
    x = torch.tensor([[torch.inf], [1.0], [3.0], [torch.nan]], device=device)
    weight = torch.tensor([0.0, 1.0, 1.0, 0.0], device=device)
    offsets = torch.tensor([0, 4], device=device)
    assert segment_mean(x, weight, offsets).tolist() == [[2.0]]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("D", [1, 24, 1030])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_kernels_err_no_more_than_plain_torch(
    lengths: list[int], D: int, dtype: torch.dtype, device: torch.device
) -> None:
    x, weight, offsets = make_inputs(lengths, dtype, device, D)
    weight[1::3] = 0
    mean = triton_forward(x, weight, offsets)
    assert mean.dtype == torch.promote_types(dtype, torch.float32)
    dmean = torch.randn_like(mean)
    dx = triton_backward(dmean, weight, offsets, dtype)
    assert dx.dtype == dtype
    assert dx.shape == x.shape
    if not sum(lengths):
        assert (mean == 0).all()
        return
    exact_x = x.double().requires_grad_()
    exact = naive(exact_x, weight, offsets)
    (d_exact,) = torch.autograd.grad(exact, exact_x, dmean.double())
    floor = 1e-15 if dtype == torch.float64 else 1e-6
    assert_within_error_budget(mean, reference(x, weight, offsets), exact.detach(), floor=floor)
    d_plain = reference_backward(dmean, weight, offsets, dtype)
    assert_within_error_budget(dx, d_plain, d_exact, floor=floor)


def test_kernels_take_any_stride_and_leave_out_infinite_rows(device: torch.device) -> None:
    x, weight, offsets = make_inputs([3, 1, 0, 4], torch.bfloat16, device)
    weight[2] = 0
    expected = triton_forward(x, weight, offsets)
    d_expected = triton_backward(expected, weight, offsets, x.dtype)
    x[2] = torch.inf
    strided = (
        x.T.contiguous().T,
        torch.stack([weight, torch.full_like(weight, torch.nan)], 1)[:, 0],
        torch.stack([offsets, offsets + 99], 1)[:, 0],
    )
    assert torch.equal(triton_forward(*strided), expected)
    rows = torch.cat([x, x], 1)[:, : x.shape[1]]
    assert torch.equal(triton_forward(rows, weight, offsets), expected)
    gradient = triton_backward(expected.T.contiguous().T, *strided[1:], x.dtype)
    assert torch.equal(gradient, d_expected)


def test_rows_beyond_the_last_segment_have_no_part_in_it(device: torch.device) -> None:
    x, weight, offsets = make_inputs([3, 1, 0, 4], torch.float32, device)
    T = len(x)
    mean = segment_mean(x, weight, offsets)
    filled = torch.cat([x, torch.full_like(x, torch.nan)]).requires_grad_()
    weights = torch.cat([weight, torch.ones_like(weight)])
    dmean = torch.randn_like(mean)
    (dx,) = torch.autograd.grad(segment_mean(filled, weights, offsets), filled, dmean)
    for forward, gradient in (
        (segment_mean(filled, weights, offsets), dx),
        (
            triton_forward(filled.detach(), weights, offsets),
            triton_backward(dmean, weights, offsets, torch.float32),
        ),
    ):
        torch.testing.assert_close(forward, mean)
        assert (gradient[T:] == 0).all()
        torch.testing.assert_close(
            gradient[:T], reference_backward(dmean, weight, offsets, x.dtype)
        )


def test_gradient_of_the_gradient(device: torch.device) -> None:
    x, weight, offsets = make_inputs([3, 0, 2], torch.float64, device, D=3)
    weight[0] = 0
    assert torch.autograd.gradgradcheck(segment_mean, (x.requires_grad_(), weight, offsets))


def test_backward_operator_contract(device: torch.device) -> None:
    _, weight, offsets = make_inputs([3, 0, 2], torch.float32, device)
    dmean = torch.randn(3, 8, device=device).requires_grad_()
    op = torch.ops.tli_engine.segment_mean_backward.default
    torch.library.opcheck(op, (dmean, weight, offsets, torch.bfloat16))
