import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tli_engine import cosine_similarity
from tli_engine.reference.cosine_similarity import cosine_similarity as reference
from tli_engine.testing import assert_within_error_budget

pytest.importorskip("triton")
from tli_engine.kernels.cosine_similarity import cosine_similarity as triton_cosine

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [  # N, M, D
    pytest.param(1, 1, 1, id="one-number"),
    pytest.param(1, 5, 8, id="one-row"),
    pytest.param(7, 3, 33, id="ragged"),
    pytest.param(16, 16, 64, id="even"),
    pytest.param(2, 2, 4096, id="wide"),
    pytest.param(0, 3, 8, id="no-x"),
    pytest.param(3, 0, 8, id="no-y"),
]


def make_inputs(
    N: int, M: int, D: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    return (
        torch.randn(N, D, device=device).to(dtype),
        torch.randn(M, D, device=device).to(dtype),
    )


def naive(x: Tensor, y: Tensor) -> Tensor:
    """The definition, pair by pair, in fp64."""
    cos = torch.empty(len(x), len(y), dtype=torch.float64, device=x.device)
    for i, a in enumerate(x.double()):
        for j, b in enumerate(y.double()):
            cos[i, j] = (a * b).sum() / (max(a.norm(), 1e-12) * max(b.norm(), 1e-12))
    return cos


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "M", "D"), SHAPES)
def test_is_within_the_error_of_plain_torch(
    N: int, M: int, D: int, dtype: torch.dtype, device: torch.device
) -> None:
    x, y = make_inputs(N, M, D, dtype, device)
    actual = cosine_similarity(x, y)
    assert actual.dtype == torch.float32
    assert actual.is_contiguous()
    if not actual.numel():
        assert actual.shape == (N, M)
        return
    plain = reference(x, y)[0]
    assert_within_error_budget(actual, plain, naive(x, y))
    # the oracle itself: rounding of a D-term product of unit vectors and of two norms
    assert (plain.double() - naive(x, y)).abs().max().item() <= 2**-24 * (8 + D**0.5)


@settings(deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 6)),
    factor=st.floats(1e-6, 1e6),
    seed=st.integers(0, 2**31),
)
def test_is_symmetric_and_blind_to_length(
    sizes: tuple[int, int, int], factor: float, seed: int
) -> None:
    N, M, D = sizes
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    y = torch.randn(M, D, generator=generator, dtype=torch.float64)
    cos = cosine_similarity(x, y)
    torch.testing.assert_close(cos, naive(x, y), rtol=0, atol=1e-12)
    torch.testing.assert_close(cos, cosine_similarity(y, x).T, rtol=0, atol=1e-14)
    torch.testing.assert_close(cos, cosine_similarity(factor * x, y), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_zero_vectors_have_no_direction(dtype: torch.dtype, device: torch.device) -> None:
    x, y = make_inputs(3, 4, 8, dtype, device)
    x[1], y[2] = 0, 0
    cos = cosine_similarity(x, y)
    assert (cos[1] == 0).all()
    assert (cos[:, 2] == 0).all()
    assert (cos != 0).sum() == 2 * 3


def test_fp16_rows_whose_squares_overflow(device: torch.device) -> None:
    """A massive activation's square is beyond fp16; the norm must not be."""
    x = torch.zeros(2, 8, dtype=torch.float16, device=device)
    x[:, 0] = 6e4
    x[1, 1] = 6e4
    cos = cosine_similarity(x, x)
    torch.testing.assert_close(cos.cpu(), torch.tensor([[1, 0.5**0.5], [0.5**0.5, 1]]))


def test_fp64_stays_fp64(device: torch.device) -> None:
    x, y = make_inputs(5, 4, 16, torch.float64, device)
    actual = cosine_similarity(x, y)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, naive(x, y), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs(dtype: torch.dtype, device: torch.device) -> None:
    x, y = make_inputs(5, 4, 16, dtype, device)
    strided = x.T.contiguous().T, torch.stack([y, torch.full_like(y, torch.nan)], 1)[:, 0]
    assert not any(t.is_contiguous() for t in strided)
    torch.testing.assert_close(
        cosine_similarity(*strided), cosine_similarity(x, y), rtol=0, atol=1e-6
    )


def test_is_deterministic_bit_for_bit(device: torch.device) -> None:
    inputs = make_inputs(33, 65, 130, torch.bfloat16, device)
    assert torch.equal(cosine_similarity(*inputs), cosine_similarity(*inputs))


@pytest.mark.parametrize(("N", "M", "D"), [(1, 1, 2), (3, 2, 4), (2, 5, 3)])
def test_gradient(N: int, M: int, D: int, device: torch.device) -> None:
    x, y = make_inputs(N, M, D, torch.float64, device)
    assert torch.autograd.gradcheck(cosine_similarity, (x.requires_grad_(), y.requires_grad_()))
    # either side alone, as when one language is frozen
    assert torch.autograd.gradcheck(cosine_similarity, (x, y.detach()))
    assert torch.autograd.gradcheck(cosine_similarity, (x.detach(), y))


def test_gradient_where_both_sides_are_one_tensor(device: torch.device) -> None:
    x, _ = make_inputs(4, 1, 3, torch.float64, device)
    assert torch.autograd.gradcheck(lambda t: cosine_similarity(t, t), x.requires_grad_())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_is_within_the_error_of_plain_torch(
    dtype: torch.dtype, device: torch.device
) -> None:
    x, y = (t.requires_grad_() for t in make_inputs(6, 5, 24, dtype, device))
    dcos = torch.randn(6, 5, device=device)
    actual = torch.autograd.grad(cosine_similarity(x, y), (x, y), dcos)
    plain = torch.autograd.grad(reference(x, y)[0], (x, y), dcos)
    exact_inputs = [t.detach().double().requires_grad_() for t in (x, y)]
    exact = torch.autograd.grad(reference(*exact_inputs)[0], exact_inputs, dcos.double())
    for a, p, e in zip(actual, plain, exact, strict=True):
        assert a.dtype == dtype
        assert_within_error_budget(a, p, e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("N", "M"), [(3, 4), (1, 1), (0, 2), (2, 0)])
def test_operator_contract(N: int, M: int, dtype: torch.dtype, device: torch.device) -> None:
    """Schema, fake tensors, autograd registration and AOT dispatch agree with the op."""
    x, y = make_inputs(N, M, 8, dtype, device)
    args = (x.requires_grad_(), y.requires_grad_())
    torch.library.opcheck(torch.ops.tli_engine.cosine_similarity.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic: bool, device: torch.device) -> None:
    torch.compiler.reset()
    compiled = torch.compile(
        cosine_similarity, fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for N, M in ((3, 4), (6, 2)):
        inputs = [t.requires_grad_() for t in make_inputs(N, M, 8, torch.float32, device)]
        results, grads = [], []
        for function in (compiled, cosine_similarity):
            results.append(function(*inputs))
            grads.append(torch.autograd.grad(results[-1].square().sum(), inputs))
        torch.testing.assert_close(*results, rtol=0, atol=0)
        torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        pytest.param(
            torch.zeros(4), torch.zeros(2, 4), r"x must be \[N, D\] and y \[M, D\]", id="x-vector"
        ),
        pytest.param(
            torch.zeros(2, 4), torch.zeros(1, 2, 4), r"got .*\[2, 4\].*\[1, 2, 4\]", id="y-cube"
        ),
        pytest.param(torch.zeros(2, 4), torch.zeros(2, 5), r"\[2, 4\].*\[2, 5\]", id="widths"),
        pytest.param(
            torch.zeros(2, 4),
            torch.zeros(2, 4, dtype=torch.float16),
            "x and y must share a dtype, got torch.float32 and torch.float16",
            id="dtypes",
        ),
    ],
)
def test_wrong_argument_is_named_in_the_error(x: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cosine_similarity(x, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("N", "M", "D"),
    [
        *SHAPES,
        pytest.param(17, 33, 300, id="past-a-tile"),
        pytest.param(40, 70, 600, id="several-parts"),
        pytest.param(150, 130, 20, id="many-rows"),
    ],
)
def test_kernels_err_no_more_than_plain_torch(
    N: int, M: int, D: int, dtype: torch.dtype, device: torch.device
) -> None:
    x, y = make_inputs(N, M, D, dtype, device)
    actual = triton_cosine(x, y)
    plain = reference(x, y)
    assert [a.shape for a in actual] == [(N, M), (N, 1), (M, 1)]
    exact = reference(x.double(), y.double())
    for got, same, truth in zip(actual, plain, exact, strict=True):
        assert got.dtype == torch.float32
        if got.numel():
            assert_within_error_budget(got, same, truth, floor=1e-6 * max(1, D**0.5))


def test_kernels_know_zero_vectors_and_any_stride(device: torch.device) -> None:
    x, y = make_inputs(20, 18, 140, torch.float32, device)
    x[3], y[17] = 0, 0
    cos, x_norm, _ = triton_cosine(x, y)
    assert (cos[3] == 0).all()
    assert (cos[:, 17] == 0).all()
    assert x_norm[3] == x_norm.new_tensor(1e-12)
    strided = x.T.contiguous().T, torch.cat([y, y.new_full(y.shape, torch.nan)], 1)[:, :140]
    assert torch.equal(triton_cosine(*strided)[0], cos)


def test_kernels_of_fp64(device: torch.device) -> None:
    x, y = make_inputs(5, 4, 16, torch.float64, device)
    for got, truth in zip(triton_cosine(x, y), reference(x, y), strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-13, atol=1e-14)
