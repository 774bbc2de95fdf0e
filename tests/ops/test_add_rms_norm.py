from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from tli_engine.ops import add_rms_norm
from tli_engine.testing import assert_within_error_budget

pytest.importorskip("triton")
from tli_engine.kernels.add_rms_norm import Tile, forward_tile, launch_forward
from tli_engine.kernels.add_rms_norm import add_rms_norm as triton_forward
from tli_engine.kernels.add_rms_norm_backward import add_rms_norm_backward as triton_backward
from tli_engine.kernels.add_rms_norm_backward import backward_tile, launch_backward, stages_for
from tli_engine.kernels.dense_rows import with_dense_rows

OPS = torch.ops.tli_engine
EPS = 1e-6
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [  # T, D
    pytest.param(1, 64, id="one-row"),
    pytest.param(3, 1, id="one-column"),
    pytest.param(5, 100, id="ragged"),
    pytest.param(3, 576, id="no-power-of-two"),
    pytest.param(2, 640, id="five-eighths"),
    pytest.param(2, 1536, id="three-quarters"),
    pytest.param(4, 4096, id="8B"),
]


def make_inputs(
    T: int, D: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    x, residual = (torch.randn(T, D, device=device).to(dtype) for _ in range(2))
    return x, residual, (torch.randn(D, device=device) * 0.5).to(dtype)


def module_of(kind: Any, weight: Tensor) -> Any:
    """One of transformers' norms, with this weight as a parameter of its own."""
    module = kind(weight.shape[0], eps=EPS)
    module.weight = torch.nn.Parameter(weight.detach().clone())
    return module


def defined(
    x: Tensor, residual: Tensor | None, weight: Tensor, plus_one: bool
) -> tuple[Tensor, Tensor]:
    """The formula, in the inputs' dtype throughout."""
    h = x if residual is None else x + residual
    scale = 1 + weight if plus_one else weight
    return scale * h / (h.square().mean(-1, keepdim=True) + EPS).sqrt(), h


def gradients(
    y: Tensor, h: Tensor, dy: Tensor, dh: Tensor | None, leaves: list[Tensor]
) -> tuple[Tensor, ...]:
    outputs, grads = ((y,), (dy,)) if dh is None else ((y, h), (dy, dh))
    return torch.autograd.grad(outputs, leaves, [g.to(y.dtype) for g in grads])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize(
    "kind",
    [LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, Gemma3RMSNorm],
    ids=lambda kind: kind.__name__,
)
def test_equals_transformers_bit_for_bit(
    kind: Any, with_residual: bool, dtype: torch.dtype
) -> None:
    x, residual, weight = make_inputs(7, 576, dtype)
    added = residual if with_residual else None
    y, h = add_rms_norm(x, added, weight, EPS, plus_one=kind is Gemma3RMSNorm)
    total = x + residual if with_residual else x
    assert torch.equal(h, total)
    assert torch.equal(y, module_of(kind, weight)(total))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma3RMSNorm], ids=["llama", "gemma"])
@pytest.mark.parametrize(("T", "D"), SHAPES)
def test_kernels_err_no_more_than_transformers(
    T: int, D: int, kind: Any, with_residual: bool, dtype: torch.dtype, device: torch.device
) -> None:
    plus_one = kind is Gemma3RMSNorm
    x, residual, weight = make_inputs(T, D, dtype, device)
    residual = residual if with_residual else None
    dy = torch.randn(T, D, device=device).to(dtype)
    dh = torch.randn(T, D, device=device).to(dtype) if with_residual else None

    y, h, rstd = triton_forward(x, residual, weight, EPS, plus_one)
    kept = h if with_residual else x
    dx, dweight = triton_backward(dy, dh, kept, rstd, weight, plus_one, True)

    module = module_of(kind, weight).to(device)
    leaf = x.detach().requires_grad_()
    total = leaf + residual if with_residual else leaf
    plain = module(total)
    d_plain = gradients(plain, total, dy, dh, [leaf, module.weight])
    exact_leaf, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    wide = residual.double() if with_residual else None
    exact = defined(exact_leaf, wide, exact_weight, plus_one)
    d_exact = gradients(*exact, dy, dh, [exact_leaf, exact_weight])
    assert rstd.dtype == torch.float32
    assert_within_error_budget(y, plain.detach(), exact[0].detach())
    if with_residual:
        assert torch.equal(h, x + residual)
    assert_within_error_budget(dx, d_plain[0], d_exact[0], floor=2e-6)
    assert_within_error_budget(dweight, d_plain[1], d_exact[1], floor=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("plus_one", [False, True], ids=["llama", "gemma"])
def test_kernel_rounds_where_transformers_does(
    plus_one: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """Rounding elsewhere changes one number in ten or more; the last bit of a row's sum, few."""
    x, residual, weight = make_inputs(8, 500, dtype, device)
    kinds = (LlamaRMSNorm, Gemma3RMSNorm)
    y = triton_forward(x, residual, weight, EPS, plus_one)[0]
    same, other = (module_of(kinds[flag], weight).to(device) for flag in (plus_one, not plus_one))
    assert (y != same(x + residual)).double().mean() < 0.01
    # what the other family would give for the same scale
    other.weight.data.add_(-1 if not plus_one else 1)
    scale_kept = (other.weight.data.double() - weight.double()).abs() == 1
    differs = (y != other(x + residual))[:, scale_kept]
    assert differs.double().mean() > 0.1


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "alone"])
def test_reference_is_the_formula(with_residual: bool, plus_one: bool) -> None:
    x, residual, weight = make_inputs(6, 40, torch.float64)
    leaves = [t.requires_grad_() for t in (x, residual, weight)]
    used = leaves if with_residual else [x, weight]
    added = residual if with_residual else None
    results = []
    for y, h in (
        add_rms_norm(x, added, weight, EPS, plus_one=plus_one),
        defined(x, added, weight, plus_one),
    ):
        loss = (y.sin() + h.square()).sum()
        results.append((y, h, *torch.autograd.grad(loss, used)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("plus_one", [False, True])
def test_gradient(plus_one: bool) -> None:
    inputs = [t.requires_grad_() for t in make_inputs(3, 5, torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: add_rms_norm(*t, EPS, plus_one=plus_one), inputs)
    x, _, weight = inputs
    assert torch.autograd.gradcheck(lambda *t: add_rms_norm(t[0], None, t[1], EPS)[0], (x, weight))


def test_gradients_asked_for_one_by_one(device: torch.device) -> None:
    inputs = make_inputs(4, 24, torch.float32, device)
    leaves = [t.detach().requires_grad_() for t in inputs]
    y, h = add_rms_norm(*leaves, EPS)
    loss = (y.square() + h.sin()).sum()
    grads = torch.autograd.grad(loss, leaves)
    assert torch.equal(grads[0], grads[1])
    for i, expected in enumerate(grads):
        alone = [t.detach().requires_grad_(i == j) for j, t in enumerate(inputs)]
        y, h = add_rms_norm(*alone, EPS)
        (grad,) = torch.autograd.grad((y.square() + h.sin()).sum(), alone[i])
        torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-6)


def test_gradient_of_one_output_alone(device: torch.device) -> None:
    x, residual, weight = (t.requires_grad_() for t in make_inputs(4, 24, torch.float32, device))
    y, h = add_rms_norm(x, residual, weight, EPS)
    dy = torch.randn_like(y)
    (of_sum,) = torch.autograd.grad(h, residual, dy, retain_graph=True)
    assert torch.equal(of_sum, dy)
    assert torch.autograd.grad(h, weight, dy, retain_graph=True, allow_unused=True) == (None,)
    of_norm = torch.autograd.grad(y, (x, weight), dy, retain_graph=True)
    zeros = torch.zeros_like(h)
    both = torch.autograd.grad((y, h), (x, weight), (dy, zeros))
    torch.testing.assert_close(of_norm, both, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tile", [Tile(1, 1), Tile(2, 4), Tile(4, 2), Tile(8, 8)], ids=str)
def test_tile_changes_rounding_at_most(tile: Tile, device: torch.device) -> None:
    x, residual, weight = make_inputs(7, 200, torch.float32, device)
    dy, dh = torch.randn_like(x), torch.randn_like(x)
    y, h, rstd = triton_forward(x, residual, weight, EPS, False)
    other = launch_forward(x, residual, weight, EPS, False, tile)
    torch.testing.assert_close(other, (y, h, rstd), rtol=1e-5, atol=1e-6)
    arguments = (dy, dh, h, rstd, weight, False, True)
    expected = triton_backward(*arguments)
    torch.testing.assert_close(launch_backward(*arguments, tile), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("T", [1, 64, 1024, 1025, 8192])
@pytest.mark.parametrize("D", [1, 16, 576, 640, 3584, 8192, 16384])
def test_tile_is_made_of_powers_of_two(D: int, T: int) -> None:
    for tile in (forward_tile(T, D), backward_tile(T, D)):
        assert all(n > 0 and n & (n - 1) == 0 for n in tile)
        assert tile.num_warps <= 16
    assert stages_for(T, D, torch.bfloat16) in (1, 2)


# a row a part; tiles of 64 rows, a part each, the last with one row or two; more tiles than parts
@pytest.mark.parametrize(("T", "parts"), [(16, 16), (65, 16), (130, 16), (130, 2)])
def test_many_rows_share_the_parts_of_the_weights_gradient(
    T: int, parts: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tli_engine.kernels.add_rms_norm_backward._PARTS", parts)
    x, _, weight = make_inputs(T, 16, torch.float32, device)
    dy = torch.randn_like(x)
    rstd = triton_forward(x, None, weight, EPS, False)[2]
    arguments = (dy, None, x, rstd, weight, False, True)
    dx, dweight = triton_backward(*arguments)
    expected = (dy.double() * x.double() * rstd.double()[:, None]).sum(0)
    torch.testing.assert_close(dweight.double(), expected, rtol=1e-5, atol=1e-4)
    alone = triton_backward(*arguments[:-1], False)[0]
    torch.testing.assert_close(dx, alone, rtol=1e-6, atol=1e-6)
    assert torch.equal(dweight, triton_backward(*arguments)[1])


def test_is_deterministic_bit_for_bit(device: torch.device) -> None:
    x, residual, weight = make_inputs(9, 300, torch.bfloat16, device)
    forward = triton_forward(x, residual, weight, EPS, True)
    again = triton_forward(x, residual, weight, EPS, True)
    assert all(torch.equal(a, b) for a, b in zip(forward, again, strict=True))
    arguments = (x, residual, forward[1], forward[2], weight, True, True)
    backward = zip(triton_backward(*arguments), triton_backward(*arguments), strict=True)
    assert all(torch.equal(a, b) for a, b in backward)


@pytest.mark.parametrize("width", [64, 61])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_views_are_not_copied_and_what_lies_between_not_read(
    dtype: torch.dtype, width: int, device: torch.device
) -> None:
    *tensors, weight = make_inputs(5, 48, dtype, device)
    padded = []
    for x in tensors:
        room = torch.full((40, width), torch.nan, device=device, dtype=dtype)[2:7, 8:56]
        padded.append(room.copy_(x))
        assert with_dense_rows(room) is room
    # rows that do not begin at 16 bytes are added up in another order, if at all
    bound = 0.0 if width == 64 else 1e-6 if dtype == torch.float32 else 1e-2
    for forward, backward in (
        (triton_forward, triton_backward),
        (OPS.add_rms_norm.default, OPS.add_rms_norm_backward.default),
    ):
        expected = forward(*tensors, weight, EPS, False)
        actual = forward(*padded, weight, EPS, False)
        arguments = (*expected[1:], weight, False, True)
        expected += backward(*tensors, *arguments)
        actual += backward(*padded, *arguments)
        assert all(t.is_contiguous() for t in actual)
        torch.testing.assert_close(actual, expected, rtol=bound, atol=bound)


def test_inputs_of_any_stride(device: torch.device) -> None:
    x, residual, weight = make_inputs(6, 40, torch.float32, device)
    strided = [x.T.contiguous().T, residual.T.contiguous().T, torch.stack([weight] * 2, 1)[:, 0]]
    for forward in (triton_forward, OPS.add_rms_norm.default):
        expected = forward(x, residual, weight, EPS, False)
        actual = forward(*strided, EPS, False)
        assert all(t.is_contiguous() for t in actual)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    # the gradient of a sum has no strides at all
    ones = torch.ones((), device=device).expand(6, 40)
    _, h, rstd = triton_forward(x, residual, weight, EPS, False)
    for backward in (triton_backward, OPS.add_rms_norm_backward.default):
        dense = backward(ones.contiguous(), ones.contiguous(), h, rstd, weight, False, True)
        bare = backward(ones, ones, h.T.contiguous().T, rstd, strided[2], False, True)
        assert all(t.is_contiguous() for t in bare)
        torch.testing.assert_close(bare, dense, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_stays_in_its_row(value: float, device: torch.device) -> None:
    x, residual, weight = make_inputs(4, 40, torch.float32, device)
    dy = torch.randn_like(x)
    for forward, backward in (
        (triton_forward, triton_backward),
        (OPS.add_rms_norm.default, OPS.add_rms_norm_backward.default),
    ):
        clean = forward(x, residual, weight, EPS, False)
        d_clean = backward(dy, dy, *clean[1:], weight, False, False)[0]
        broken = x.clone()
        broken[1, 3] = value
        y, h, rstd = forward(broken, residual, weight, EPS, False)
        dx = backward(dy, dy, h, rstd, weight, False, False)[0]
        assert y[1, 3].isnan()
        assert not dx[1].isfinite().all()
        if value != value:
            assert y[1].isnan().all()
        others = [0, 2, 3]
        assert torch.equal(y[others], clean[0][others])
        assert torch.equal(dx[others], d_clean[others])


def test_a_row_of_zeros(device: torch.device) -> None:
    x, _, weight = make_inputs(2, 40, torch.float32, device)
    for forward in (triton_forward, OPS.add_rms_norm.default):
        y, _, rstd = forward(torch.zeros_like(x), None, weight, EPS, False)
        assert (y == 0).all()
        torch.testing.assert_close(rstd, torch.full_like(rstd, EPS**-0.5))


def test_without_a_residual_the_sum_is_the_input() -> None:
    x, _, weight = make_inputs(3, 16, torch.float32)
    assert add_rms_norm(x, None, weight, EPS)[1] is x


def test_no_rows(device: torch.device) -> None:
    x, residual, weight = make_inputs(0, 24, torch.bfloat16, device)
    for forward in (triton_forward, OPS.add_rms_norm.default):
        y, h, rstd = forward(x, residual, weight, EPS, False)
        assert y.shape == h.shape == (0, 24)
        assert rstd.shape == (0,)
        for backward in (triton_backward, OPS.add_rms_norm_backward.default):
            dx, dweight = backward(y, h, h, rstd, weight, False, True)
            assert dx.shape == (0, 24)
            assert torch.equal(dweight, torch.zeros_like(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("T", [1, 5])
def test_operator_contract(
    T: int, with_residual: bool, dtype: torch.dtype, device: torch.device
) -> None:
    x, residual, weight = (t.requires_grad_() for t in make_inputs(T, 16, dtype, device))
    added = residual if with_residual else None
    torch.library.opcheck(OPS.add_rms_norm.default, (x, added, weight, EPS, False))
    with torch.no_grad():
        y, h, rstd = OPS.add_rms_norm.default(x, residual, weight, EPS, False)
    dh = h.clone() if with_residual else None
    for needs_dweight in (False, True):
        arguments = (y, dh, h, rstd, weight.detach(), True, needs_dweight)
        torch.library.opcheck(OPS.add_rms_norm_backward.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "alone"])
def test_compiles_without_graph_breaks(
    with_residual: bool, dynamic: bool, device: torch.device
) -> None:
    torch.compiler.reset()
    compiled = torch.compile(add_rms_norm, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T in (5, 3):
        leaves = [t.requires_grad_() for t in make_inputs(T, 16, torch.float32, device)]
        added = leaves[1] if with_residual else None
        used = leaves if with_residual else [leaves[0], leaves[2]]
        results, grads = [], []
        for function in (compiled, add_rms_norm):
            y, h = function(leaves[0], added, leaves[2], EPS)
            results.append((y, h))
            grads.append(torch.autograd.grad((y.square() + h.sin()).sum(), used))
        torch.testing.assert_close(*results, rtol=0, atol=0)
        torch.testing.assert_close(*grads, rtol=0, atol=0)


X, W = torch.zeros(3, 8), torch.zeros(8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param((X[0], None, W), r"x must be \[T, D\], got \[8\]", id="x-vector"),
        pytest.param((X[:, :0], None, W), r"x must be \[T, D\], got \[3, 0\]", id="x-narrow"),
        pytest.param((X.int(), None, W), "x must be floating point, got torch.int32", id="int"),
        pytest.param((X, X[:2], W), r"residual must be \[3, 8\] as x, got \[2, 8\]", id="residual"),
        pytest.param((X, X, W[:4]), r"weight must be \[8\], got \[4\]", id="weight"),
        pytest.param(
            (X, X.half(), W),
            "residual must be torch.float32 as x, got torch.float16",
            id="residual-dtype",
        ),
        pytest.param(
            (X.bfloat16(), None, W),
            "weight must be torch.bfloat16 as x, got torch.float32",
            id="weight-dtype",
        ),
        pytest.param(
            (X, None, W.to("meta")), "weight must be on cpu as x, got meta", id="weight-device"
        ),
    ],
)
def test_wrong_argument_is_named_in_the_error(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_rms_norm(*arguments, EPS)
