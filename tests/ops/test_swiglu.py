from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from tli_engine.ops import swiglu
from tli_engine.testing import assert_within_error_budget

pytest.importorskip("triton")
from tli_engine.kernels.dense_rows import with_dense_rows
from tli_engine.kernels.swiglu import Tile, launch_forward, programs, tile_for
from tli_engine.kernels.swiglu import swiglu as triton_forward
from tli_engine.kernels.swiglu_backward import launch_backward
from tli_engine.kernels.swiglu_backward import swiglu_backward as triton_backward

OPS = torch.ops.tli_engine
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# name here, and in transformers' configurations
ACTS = [pytest.param("silu", "silu", id="silu"), pytest.param("gelu_tanh", "gelu_pytorch_tanh")]
SHAPES = [  # T, I
    pytest.param(1, 64, id="one-row"),
    pytest.param(3, 1, id="one-column"),
    pytest.param(5, 100, id="ragged"),
    pytest.param(3, 1024, id="even-tiles"),
    pytest.param(2, 1025, id="one-past-a-tile"),
    pytest.param(3, 1536, id="no-power-of-two"),
]


def make_inputs(
    T: int, I: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """A projection, gates of it in the tails too, and a gradient."""
    gate_up = torch.randn(T, 2 * I, device=device) * 3
    return gate_up.to(dtype), torch.randn(T, I, device=device).to(dtype)


def plain(gate_up: Tensor, name: str) -> Tensor:
    """The lines of transformers' MLP between its projections."""
    gate, up = gate_up.chunk(2, dim=1)
    out: Tensor = ACT2FN[name](gate) * up
    return out


def with_gradient(gate_up: Tensor, dout: Tensor, name: str) -> tuple[Tensor, Tensor]:
    leaf = gate_up.detach().requires_grad_()
    out = plain(leaf, name)
    (grad,) = torch.autograd.grad(out, leaf, dout.to(out.dtype))
    return out.detach(), grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("act", "name"), ACTS)
def test_equals_transformers_bit_for_bit(act: str, name: str, dtype: torch.dtype) -> None:
    gate_up, _ = make_inputs(7, 333, dtype)
    assert torch.equal(swiglu(gate_up, act), plain(gate_up, name))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("act", "name"), ACTS)
@pytest.mark.parametrize(("T", "I"), SHAPES)
def test_kernels_err_no_more_than_transformers(
    T: int, I: int, act: str, name: str, dtype: torch.dtype, device: torch.device
) -> None:
    gate_up, dout = make_inputs(T, I, dtype, device)
    same, d_same = with_gradient(gate_up, dout, name)
    exact, d_exact = with_gradient(gate_up.double(), dout, name)
    out, dgate_up = triton_forward(gate_up, act), triton_backward(dout, gate_up, act)
    assert out.is_contiguous()
    assert dgate_up.is_contiguous()
    # fp32 products of numbers of size 10
    assert_within_error_budget(out, same, exact, floor=4e-6)
    assert_within_error_budget(dgate_up, d_same, d_exact, floor=4e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("act", "name"), ACTS)
def test_activation_is_rounded_before_it_is_multiplied(
    act: str, name: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Rounding once would change one number in three or so; the last bit of an exponential, few."""
    gate_up, _ = make_inputs(20, 500, dtype, device)
    # PyTorch's tanh loses digits in the tail
    gate_up[:, :500].clamp_(min=-1)
    out = triton_forward(gate_up, act)
    once = plain(gate_up.float(), name).to(dtype)
    assert (out != plain(gate_up, name)).double().mean() < 0.01
    assert (out != once).double().mean() > 0.1


@pytest.mark.parametrize(("act", "name"), ACTS)
def test_reference_gradient_is_that_of_transformers(act: str, name: str) -> None:
    gate_up, dout = make_inputs(6, 40, torch.float64)
    leaf = gate_up.requires_grad_()
    (ours,) = torch.autograd.grad(swiglu(leaf, act), leaf, dout)
    torch.testing.assert_close(ours, with_gradient(gate_up, dout, name)[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
def test_gradient(act: str) -> None:
    leaf = make_inputs(3, 5, torch.float64)[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: swiglu(x, act), leaf)


@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(
    "tile", [Tile(1, 16, 1), Tile(2, 64, 4), Tile(4, 256, 2), Tile(8, 2048, 8)], ids=str
)
def test_tile_changes_nothing(tile: Tile, act: str, device: torch.device) -> None:
    gate_up, dout = make_inputs(7, 200, torch.bfloat16, device)
    assert torch.equal(launch_forward(gate_up, act, tile), triton_forward(gate_up, act))
    backward = launch_backward(dout, gate_up, act, tile)
    assert torch.equal(backward, triton_backward(dout, gate_up, act))


@pytest.mark.parametrize("T", [1, 3, 64, 8192])
@pytest.mark.parametrize("I", [1, 100, 1536, 14336, 29568])
def test_tiles_cover_the_output(T: int, I: int) -> None:
    tile = tile_for(T, I)
    assert all(n > 0 and n & (n - 1) == 0 for n in tile)
    assert programs(T, I, tile) * tile.rows * tile.columns >= T * I
    assert tile.rows * tile.columns <= 2048


def test_rows_of_views_are_not_copied_and_what_lies_between_not_read(device: torch.device) -> None:
    gate_up, dout = make_inputs(5, 48, torch.bfloat16, device)
    room = torch.full((9, 130), torch.nan, device=device).bfloat16()
    view, d_view = room[2:7, 8:104], room.clone()[2:7, 8:56]
    view.copy_(gate_up)
    d_view.copy_(dout)
    assert with_dense_rows(view) is view
    for forward, backward in (
        (triton_forward, triton_backward),
        (OPS.swiglu.default, OPS.swiglu_backward.default),
    ):
        out, dgate_up = forward(view, "silu"), backward(d_view, view, "silu")
        assert out.is_contiguous()
        assert dgate_up.is_contiguous()
        assert torch.equal(out, forward(gate_up, "silu"))
        assert torch.equal(dgate_up, backward(dout, gate_up, "silu"))


def test_inputs_of_any_stride(device: torch.device) -> None:
    gate_up, _ = make_inputs(6, 40, torch.float32, device)
    strided = gate_up.T.contiguous().T
    # the gradient of a sum has no strides at all
    ones = torch.ones((), device=device).expand(6, 40)
    for forward, backward in (
        (triton_forward, triton_backward),
        (OPS.swiglu.default, OPS.swiglu_backward.default),
    ):
        out, dgate_up = forward(strided, "silu"), backward(ones, strided, "silu")
        assert out.is_contiguous()
        assert dgate_up.is_contiguous()
        torch.testing.assert_close(out, forward(gate_up, "silu"))
        torch.testing.assert_close(dgate_up, backward(ones.contiguous(), gate_up, "silu"))


@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("column", [2, 42], ids=["gate", "up"])
def test_a_nan_stays_in_its_element(column: int, act: str, device: torch.device) -> None:
    gate_up, dout = make_inputs(4, 40, torch.float32, device)
    gate_up[1, column] = torch.nan
    for forward, backward in (
        (triton_forward, triton_backward),
        (OPS.swiglu.default, OPS.swiglu_backward.default),
    ):
        assert forward(gate_up, act).isnan().nonzero().tolist() == [[1, 2]]
        # up's gradient does not depend on up
        lost = [[1, 2], [1, 42]] if column == 2 else [[1, 2]]
        assert backward(dout, gate_up, act).isnan().nonzero().tolist() == lost


@pytest.mark.parametrize(("act", "name"), ACTS)
def test_large_gates(act: str, name: str, device: torch.device) -> None:
    """Where the exponential leaves fp32's range, the activation is 0 or the gate itself."""
    gate = torch.tensor([[-3e4, -200.0, -89.0, 89.0, 200.0, 3e4]], device=device)
    gate_up, ones = torch.cat([gate, torch.ones_like(gate)], 1), torch.ones_like(gate)
    out, dgate_up = with_gradient(gate_up, ones, name)
    torch.testing.assert_close(triton_forward(gate_up, act), out, rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(triton_backward(ones, gate_up, act), dgate_up, rtol=1e-6, atol=1e-30)


def test_no_rows(device: torch.device) -> None:
    gate_up, dout = make_inputs(0, 24, torch.bfloat16, device)
    for forward in (triton_forward, OPS.swiglu.default):
        assert forward(gate_up, "silu").shape == (0, 24)
    for backward in (triton_backward, OPS.swiglu_backward.default):
        assert backward(dout, gate_up, "silu").shape == (0, 48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("T", [1, 5])
def test_operator_contract(T: int, act: str, dtype: torch.dtype, device: torch.device) -> None:
    gate_up, dout = make_inputs(T, 16, dtype, device)
    torch.library.opcheck(OPS.swiglu.default, (gate_up.clone().requires_grad_(), act))
    torch.library.opcheck(OPS.swiglu_backward.default, (dout, gate_up, act))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic: bool, device: torch.device) -> None:
    torch.compiler.reset()
    compiled = torch.compile(swiglu, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T in (5, 3):
        leaf = make_inputs(T, 16, torch.float32, device)[0].requires_grad_()
        results, grads = [], []
        for function in (compiled, swiglu):
            results.append(function(leaf, "gelu_tanh"))
            grads.append(torch.autograd.grad(results[-1].square().sum(), leaf)[0])
        torch.testing.assert_close(*results, rtol=0, atol=0)
        torch.testing.assert_close(*grads, rtol=0, atol=0)


X = torch.zeros(3, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param((X[0],), r"gate_up must be \[T, 2 I\], got \[8\]", id="vector"),
        pytest.param((X[:, :7],), r"gate_up must be \[T, 2 I\], got \[3, 7\]", id="odd"),
        pytest.param((X[:, :0],), r"gate_up must be \[T, 2 I\], got \[3, 0\]", id="narrow"),
        pytest.param((X.int(),), "gate_up must be floating point, got torch.int32", id="int"),
        pytest.param((X, "relu"), "act must be silu or gelu_tanh, got 'relu'", id="act"),
    ],
)
def test_wrong_argument_is_named_in_the_error(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        swiglu(*arguments)
