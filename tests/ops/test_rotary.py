from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tli_engine.ops.rotary import rotary
from tli_engine.testing import assert_within_error_budget

pytest.importorskip("triton")
from tli_engine.kernels.rotary import Tile, half_of, launch, tile_for, with_dense_rows
from tli_engine.kernels.rotary import rotary as triton_rotary

OP = torch.ops.tli_engine.rotary.default
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [  # T, H, D, heads
    pytest.param(1, 1, 2, 1, id="one-pair"),
    pytest.param(5, 6, 128, 5, id="values-copied"),
    pytest.param(3, 4, 8, 4, id="all-rotated"),
    pytest.param(3, 4, 8, 0, id="none-rotated"),
    pytest.param(7, 3, 96, 2, id="no-power-of-two"),
    pytest.param(4, 16, 64, 9, id="even-tiles"),
    pytest.param(11, 3, 64, 1, id="one-past-a-tile"),
]


def make_angles(T: int, D: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Cosines and sines of angles of any size, fp32."""
    angles = torch.rand(T, D // 2, device=device) * 100
    return angles.cos(), angles.sin()


def make_inputs(
    T: int, H: int, D: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(T, H, D, device=device).to(dtype)
    return (x, *(angles.to(dtype) for angles in make_angles(T, D, device)))


def plain(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """transformers' lines, in the inputs' dtype."""
    cos, sin = (torch.cat([angles, angles], 1)[None] for angles in (cos, sin))
    rotated = x[None, :, :heads].transpose(1, 2)
    rotated, _ = apply_rotary_pos_emb(rotated, rotated, cos, sin)
    return torch.cat([rotated.transpose(1, 2)[0], x[:, heads:]], dim=1)


@pytest.mark.parametrize("wide", [False, True], ids=["angles-as-x", "angles-fp32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "H", "D", "heads"), SHAPES)
def test_errs_no_more_than_transformers(
    T: int, H: int, D: int, heads: int, dtype: torch.dtype, wide: bool, device: torch.device
) -> None:
    x, cos, sin = make_inputs(T, H, D, dtype, device)
    angles = (cos.float(), sin.float()) if wide else (cos, sin)
    for inverse in (False, True):
        sign = -1 if inverse else 1
        exact = plain(x.double(), cos.double(), sign * sin.double(), heads)
        same = plain(x, cos, sign * sin, heads)
        for function in (triton_rotary, OP):
            out = function(x, *angles, heads, inverse)
            assert out.is_contiguous()
            assert out.dtype == dtype
            assert_within_error_budget(out, same, exact)
            assert torch.equal(out[:, heads:], x[:, heads:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_is_rounded_once(dtype: torch.dtype, device: torch.device) -> None:
    x, cos, sin = make_inputs(20, 3, 64, dtype, device)
    exact = plain(x.double(), cos.double(), sin.double(), 3)
    for function in (triton_rotary, OP):
        # products in fp32 may fall on the other side of a tie; rounding them would change many
        assert (function(x, cos, sin, 3, False) != exact.to(dtype)).double().mean() < 1e-3
    assert (plain(x, cos, sin, 3) != exact.to(dtype)).double().mean() > 0.1


def test_angles_in_fp32_are_not_rounded(device: torch.device) -> None:
    x, _, _ = make_inputs(20, 3, 64, torch.bfloat16, device)
    cos, sin = make_angles(20, 64, device)
    exact = plain(x.double(), cos.double(), sin.double(), 3)
    for function in (triton_rotary, OP):
        out = function(x, cos, sin, 3, False)
        assert (out != exact.bfloat16()).double().mean() < 1e-3
        rounded = function(x, cos.bfloat16(), sin.bfloat16(), 3, False)
        assert (rounded != exact.bfloat16()).double().mean() > 0.1


@pytest.mark.parametrize("doubled", [False, True], ids=["half", "transformers"])
def test_equals_transformers_in_fp64(doubled: bool) -> None:
    x, cos, sin = make_inputs(6, 5, 10, torch.float64)
    expected = plain(x, cos, sin, 3)
    if doubled:
        cos, sin = torch.cat([cos, cos], 1), torch.cat([sin, sin], 1)
    torch.testing.assert_close(rotary(x, cos, sin, 3), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("heads", [0, 2, 3])
def test_gradient(heads: int) -> None:
    x, cos, sin = make_inputs(3, 3, 6, torch.float64)
    leaf = x.requires_grad_()
    assert torch.autograd.gradcheck(lambda t: rotary(t, cos, sin, heads), leaf)
    assert torch.autograd.gradgradcheck(lambda t: rotary(t, cos, sin, heads), leaf)


def test_gradient_turns_back(device: torch.device) -> None:
    """The gradient of half the squared norm is the output turned back, which is the input."""
    x, _, _ = make_inputs(9, 4, 64, torch.float32, device)
    cos, sin = make_angles(9, 64, device)
    for function in (triton_rotary, OP):
        back = function(function(x, cos, sin, 3, False), cos, sin, 3, True)
        torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tile", [Tile(1, 1), Tile(2, 4), Tile(8, 2), Tile(128, 8)], ids=str)
def test_tile_changes_nothing(tile: Tile, device: torch.device) -> None:
    inputs = make_inputs(7, 5, 48, torch.bfloat16, device)
    for inverse in (False, True):
        expected = triton_rotary(*inputs, 4, inverse)
        assert torch.equal(launch(*inputs, 4, inverse, tile), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [2, 64, 80, 128, 256, 4096])
@pytest.mark.parametrize("rows", [1, 48, 8192 * 48])
def test_tiles_are_powers_of_two(rows: int, D: int, dtype: torch.dtype) -> None:
    tile = tile_for(rows, D, dtype)
    assert all(n > 0 and n & (n - 1) == 0 for n in tile)
    assert tile.rows * half_of(D) <= max(half_of(D), 128 * 32 // dtype.itemsize)


def test_views_are_not_copied_and_what_lies_between_not_read(device: torch.device) -> None:
    x, cos, sin = make_inputs(5, 3, 48, torch.bfloat16, device)
    room = torch.full((9, 6, 50), torch.nan, device=device).bfloat16()
    view = room[2:7, 1:4, :48]
    view.copy_(x)
    angles = torch.full((2, 5, 64), torch.nan, device=device).bfloat16()
    angles[0, :, 8:32], angles[1, :, 8:32] = cos, sin
    assert with_dense_rows(view) is view
    for function in (triton_rotary, OP):
        out = function(view, angles[0, :, 8:32], angles[1, :, 8:32], 2, False)
        assert out.is_contiguous()
        assert torch.equal(out, function(x, cos, sin, 2, False))


def test_inputs_of_any_stride(device: torch.device) -> None:
    x, cos, sin = make_inputs(6, 4, 16, torch.float32, device)
    strided = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    angles = cos.T.contiguous().T, sin.T.contiguous().T
    # the gradient of a sum has no strides at all
    ones = torch.ones((), device=device).expand(6, 4, 16)
    for function in (triton_rotary, OP):
        expected = function(x, cos, sin, 3, False)
        torch.testing.assert_close(function(strided, *angles, 3, False), expected)
        back = function(ones, *angles, 3, True)
        assert back.is_contiguous()
        torch.testing.assert_close(back, function(ones.contiguous(), cos, sin, 3, True))


# NumPy, which interprets the kernel, says that inf times 0 is NaN
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_pair(value: float, device: torch.device) -> None:
    x, cos, sin = make_inputs(4, 3, 8, torch.float32, device)
    # one that is rotated, one that is copied
    x[1, 0, 2] = x[2, 2, 5] = value
    for function in (triton_rotary, OP):
        lost = ~function(x, cos, sin, 2, False).isfinite()
        assert lost.nonzero().tolist() == [[1, 0, 2], [1, 0, 6], [2, 2, 5]]


def test_angles_of_heads_that_are_copied_are_not_used(device: torch.device) -> None:
    x, cos, sin = make_inputs(4, 3, 8, torch.float32, device)
    for function in (triton_rotary, OP):
        out = function(x, cos * torch.nan, sin * torch.nan, 2, False)
        assert torch.equal(out[:, 2:], x[:, 2:])


def test_no_rows(device: torch.device) -> None:
    for function in (triton_rotary, OP):
        for shape in ((0, 3, 8), (3, 0, 8)):
            inputs = make_inputs(*shape, torch.bfloat16, device)
            assert function(*inputs, 0, False).shape == shape


def test_input_is_left_as_it_was(device: torch.device) -> None:
    x, cos, sin = make_inputs(4, 3, 8, torch.float32, device)
    for heads in (0, 2, 3):
        for function in (triton_rotary, OP):
            before = x.clone()
            function(x, cos, sin, heads, False).zero_()
            assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("T", [1, 5])
def test_operator_contract(T: int, dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("fp64 is for a CPU")
    x, cos, sin = make_inputs(T, 3, 8, dtype, device)
    torch.library.opcheck(OP, (x.clone().requires_grad_(), cos, sin, 2))
    torch.library.opcheck(OP, (x, cos, sin, 2, True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic: bool, device: torch.device) -> None:
    torch.compiler.reset()
    compiled = torch.compile(rotary, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T in (5, 3):
        x, cos, sin = make_inputs(T, 4, 16, torch.float32, device)
        leaf = x.requires_grad_()
        results, grads = [], []
        for function in (compiled, rotary):
            results.append(function(leaf, cos, sin, 3))
            grads.append(torch.autograd.grad(results[-1].pow(3).sum(), leaf)[0])
        torch.testing.assert_close(*results, rtol=0, atol=0)
        torch.testing.assert_close(*grads, rtol=0, atol=0)


X, ANGLES = torch.zeros(3, 4, 8), torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param((X[0], ANGLES, ANGLES), r"x must be \[T, H, D\] .*\[4, 8\]", id="matrix"),
        pytest.param(
            (X[..., :7], ANGLES, ANGLES), r"x must be .* an even D, got \[3, 4, 7\]", id="odd"
        ),
        pytest.param((X.int(), ANGLES, ANGLES), "x must be floating point", id="int"),
        pytest.param(
            (X, ANGLES[:2], ANGLES), r"cos must be \[3, 8\] or \[3, 4\], got \[2, 4\]", id="cos"
        ),
        pytest.param((X, ANGLES, ANGLES[:, :3]), r"sin must be .* got \[3, 3\]", id="sin"),
        pytest.param(
            (X, ANGLES.half(), ANGLES),
            "cos must be torch.float32 as x, or fp32, got torch.float16",
            id="cos-dtype",
        ),
        pytest.param(
            (X.half(), ANGLES.half(), ANGLES.bfloat16()),
            "sin must be torch.float16 as x, or fp32, got torch.bfloat16",
            id="sin-dtype",
        ),
        pytest.param(
            (X, ANGLES, ANGLES.to("meta")), "sin must be on cpu as x, got meta", id="device"
        ),
        pytest.param((X, ANGLES, ANGLES, 5), "heads must be 0 to 4, got 5", id="many"),
        pytest.param((X, ANGLES, ANGLES, -1), "heads must be 0 to 4, got -1", id="negative"),
    ],
)
def test_wrong_argument_is_named_in_the_error(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rotary(*arguments)
