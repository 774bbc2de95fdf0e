from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tli_engine import nf4_linear
from tli_engine.nf4 import NF4Weight, quantize
from tli_engine.nn import NF4Linear
from tli_engine.reference.nf4_linear import tile
from tli_engine.testing import assert_within_error_budget

pytest.importorskip("triton")
from tli_engine.kernels.nf4_dispatch import Tile, choose_tile, default_tile, fast_table
from tli_engine.kernels.nf4_linear import fused_forward
from tli_engine.kernels.nf4_linear import nf4_linear as triton_nf4_linear
from tli_engine.kernels.nf4_linear_dx import fused_dx
from tli_engine.kernels.nf4_linear_dx import nf4_linear_dx as triton_nf4_linear_dx

HALF = [torch.float16, torch.bfloat16]
SHAPES = [  # M, N, K, split
    pytest.param(1, 1, 128, 1, id="one-number"),
    pytest.param(16, 64, 128, 1, id="even"),
    pytest.param(17, 70, 256, 2, id="one-past-a-tile"),
]


def make_inputs(
    M: int, N: int, K: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, NF4Weight, Tensor, Tensor]:
    weight = quantize((torch.randn(N, K, device=device) * 0.05).to(dtype))
    x, bias, dy = (torch.randn(s, device=device).to(dtype) for s in ((M, K), (N,), (M, N)))
    return x, weight, bias, dy


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("M", "N", "K", "split"), SHAPES)
def test_fused_kernels_err_no_more_than_plain_torch(
    M: int, N: int, K: int, split: int, dtype: torch.dtype, tiled: bool, device: torch.device
) -> None:
    x, weight, bias, dy = make_inputs(M, N, K, dtype, device)
    stored = tile(weight.packed, weight.absmax, N, K) if tiled else (weight.packed, weight.absmax)
    y = fused_forward(x, *stored, bias, N, tiled, False, Tile(16, 64, split, 4, 2))
    dx = fused_dx(dy, *stored, K, tiled, False, Tile(16, 32, split, 4, 2))
    W = weight.dequantize(dtype)
    exact = x.double() @ W.double().T + bias.double()
    assert_within_error_budget(y, torch.nn.functional.linear(x, W, bias), exact)
    assert_within_error_budget(dx, dy @ W, dy.double() @ W.double())


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_fast_rounds_codes_and_absmax_first(dtype: torch.dtype, device: torch.device) -> None:
    x, weight, _, dy = make_inputs(9, 40, 256, dtype, device)
    ones = NF4Weight(weight.packed, torch.ones_like(weight.absmax), (40, 256), dtype)
    scale = weight.absmax.to(dtype).repeat_interleave(64).view(40, 256)
    W = ones.dequantize(dtype) * scale
    arguments = (weight.packed, weight.absmax)
    y = fused_forward(x, *arguments, None, 40, False, True, Tile(16, 64, 1, 4, 2))
    dx = fused_dx(dy, *arguments, 256, False, True, Tile(16, 32, 1, 4, 2))
    assert_within_error_budget(y, x @ W.T, x.double() @ W.double().T)
    assert_within_error_budget(dx, dy @ W, dy.double() @ W.double())


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_table_of_fast_holds_the_rounded_codes(dtype: torch.dtype, device: torch.device) -> None:
    planes = fast_table(torch.empty(0, dtype=dtype, device=device)).view(torch.uint8).view(2, 16)
    weight = NF4Weight(
        torch.arange(8, device=device, dtype=torch.uint8)[:, None] * 0x22 + 1,
        torch.ones(1, device=device),
        (1, 16),
        dtype,
    )
    bits = planes[0].to(torch.int32) | (planes[1].to(torch.int32) << 8)
    assert torch.equal(bits.to(torch.int16).view(dtype), weight.dequantize()[0])


def test_rows_not_asked_for_are_not_read(device: torch.device) -> None:
    """Memory past the input's last row may be anything."""
    x, weight, _, _ = make_inputs(3, 20, 128, torch.float16, device)
    padded = torch.full((16, 128), torch.nan, dtype=torch.float16, device=device)
    padded[:3] = x
    arguments = (weight.packed, weight.absmax, None, 20, False, False, Tile(16, 64, 1, 4, 2))
    assert torch.equal(fused_forward(padded[:3], *arguments), fused_forward(x, *arguments))


def test_is_deterministic_bit_for_bit(device: torch.device) -> None:
    x, weight, bias, _ = make_inputs(17, 70, 256, torch.bfloat16, device)
    arguments = (weight.packed, weight.absmax, bias, 70, False, False, Tile(16, 64, 2, 4, 2))
    assert torch.equal(fused_forward(x, *arguments), fused_forward(x, *arguments))


@pytest.mark.parametrize(
    ("M", "N", "K", "block_size", "dtype"),
    [
        pytest.param(3, 8, 192, 64, torch.bfloat16, id="K-no-multiple-of-128"),
        pytest.param(3, 8, 100, 64, torch.bfloat16, id="blocks-across-rows"),
        pytest.param(3, 5, 33, 64, torch.float16, id="odd-everything"),
        pytest.param(3, 8, 128, 128, torch.float16, id="other-block-size"),
        pytest.param(3, 8, 128, 64, torch.float32, id="fp32"),
        pytest.param(200, 4, 128, 64, torch.float16, id="many-rows"),
        pytest.param(0, 8, 128, 64, torch.float16, id="no-rows"),
    ],
)
def test_what_no_fused_kernel_takes_is_dequantised_first(
    M: int, N: int, K: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    weight = quantize(torch.randn(N, K, device=device).to(dtype), block_size=block_size)
    x, dy = torch.randn(M, K, device=device).to(dtype), torch.randn(M, N, device=device).to(dtype)
    W = weight.dequantize(dtype)
    y = triton_nf4_linear(x, weight.packed, weight.absmax, None, N, block_size, False, False)
    dx = triton_nf4_linear_dx(dy, weight.packed, weight.absmax, K, block_size, False, False)
    torch.testing.assert_close(y, x @ W.T, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(dx, dy @ W, rtol=2e-2, atol=2e-2)
    if M and dtype != torch.float32 and device.type == "cpu":
        absmax = weight.absmax
        fused = choose_tile("fwd", x, M, N, K, block_size, absmax)
        assert fused is None


@given(
    direction=st.sampled_from(["fwd", "dx"]),
    capability=st.sampled_from([(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]),
    M=st.integers(1, 9000),
    N=st.integers(1, 60000),
    K=st.integers(1, 300).map(lambda k: 128 * k),
)
def test_default_tile_leaves_no_part_empty(
    direction: str, capability: tuple[int, int], M: int, N: int, K: int
) -> None:
    """A part without a step would break the kernel's assumption that its loop runs."""
    chosen = default_tile(direction, capability, 132, M, N, K)
    if chosen is not None:
        steps = K // 128 if direction == "fwd" else -(-N // chosen.block_n)
        assert chosen.split <= steps
        assert chosen.block_m >= 16


@settings(max_examples=20)
@given(
    lead=st.lists(st.integers(0, 3), max_size=2),
    N=st.integers(1, 5),
    K=st.integers(1, 70),
    seed=st.integers(0, 1000),
)
def test_equals_the_dequantised_product_for_any_shape(
    lead: list[int], N: int, K: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = quantize(torch.randn(N, K, generator=generator))
    x = torch.randn(*lead, K, generator=generator, dtype=torch.float64)
    W = weight.dequantize(torch.float32).double()
    torch.testing.assert_close(nf4_linear(x, weight), x @ W.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("N", [1, 3])
def test_gradient(N: int, device: torch.device) -> None:
    weight = quantize(torch.randn(N, 6, device=device))
    x = torch.randn(2, 3, 6, dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.randn(N, dtype=torch.float64, device=device, requires_grad=True)
    if device.type == "cpu":
        assert torch.autograd.gradcheck(lambda x, b: nf4_linear(x, weight, b), (x, bias))
        assert torch.autograd.gradgradcheck(lambda x: nf4_linear(x, weight), (x,))


def test_strided_input(device: torch.device) -> None:
    x, weight, _, _ = make_inputs(6, 8, 128, torch.float32, device)
    strided = x.T.contiguous().T
    assert not strided.is_contiguous()
    expected = nf4_linear(x, weight)
    torch.testing.assert_close(nf4_linear(strided, weight), expected)
    torch.testing.assert_close(nf4_linear(x.view(2, 3, 128), weight), expected.view(2, 3, 8))


def test_double_quantised_weight(device: torch.device) -> None:
    weight = quantize(torch.randn(8, 128, device=device), double_quant=True)
    x = torch.randn(3, 128, device=device)
    torch.testing.assert_close(nf4_linear(x, weight), x @ weight.dequantize().T)


@pytest.mark.parametrize("M", [0, 1, 3])
def test_operator_contract(M: int, device: torch.device) -> None:
    x, weight, bias, dy = make_inputs(M, 4, 64, torch.float32, device)
    stored = (weight.packed, weight.absmax)
    ops = torch.ops.tli_engine
    args = (x.requires_grad_(), *stored, bias.requires_grad_(), 4, 64, False, False)
    torch.library.opcheck(ops.nf4_linear.default, args)
    torch.library.opcheck(
        ops.nf4_linear_dx.default, (dy.requires_grad_(), *stored, 64, 64, False, False)
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic: bool, device: torch.device) -> None:
    torch.compiler.reset()
    _, weight, bias, _ = make_inputs(1, 4, 64, torch.float32, device)
    layer = NF4Linear(weight, bias)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for M in (3, 5):
        x = torch.randn(M, 64, device=device, requires_grad=True)
        results, grads = [], []
        for function in (compiled, layer):
            results.append(function(x))
            grads.append(torch.autograd.grad(results[-1].square().sum(), x))
        torch.testing.assert_close(*results, rtol=0, atol=0)
        torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.parametrize("residency", ["nf4", "bf16", "auto"])
def test_module_gives_the_ops_result(residency: Any, device: torch.device) -> None:
    x, weight, bias, _ = make_inputs(3, 8, 128, torch.float32, device)
    layer = NF4Linear(weight, bias, weight_residency=residency)
    torch.testing.assert_close(layer(x.view(3, 1, 128))[:, 0], nf4_linear(x, weight, bias))
    assert torch.equal(layer.weight.packed, weight.packed)
    assert torch.equal(layer.weight.absmax, weight.absmax)
    if residency == "bf16":
        assert layer.nbytes == weight.nbytes + 8 * 128 * 4
    assert f"weight_residency={layer.weight_residency}" in repr(layer)


X, W = torch.zeros(2, 128), quantize(torch.ones(8, 128))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(
            lambda: nf4_linear(X[:, :64], W),
            r"x must be \[\.\.\., 128\] for a weight \[8, 128\], got \[2, 64\]",
            id="width",
        ),
        pytest.param(
            lambda: nf4_linear(X.int(), W), "x must be floating point, got torch.int32", id="int"
        ),
        pytest.param(
            lambda: nf4_linear(X.to("meta"), W), "x must be on cpu as the weight", id="device"
        ),
        pytest.param(
            lambda: nf4_linear(X, W, torch.zeros(7)),
            r"bias must be torch.float32 \[8\], got torch.float32 \[7\]",
            id="bias-size",
        ),
        pytest.param(
            lambda: nf4_linear(X, W, torch.zeros(8, dtype=torch.float16)),
            r"bias must be torch.float32 \[8\], got torch.float16",
            id="bias-dtype",
        ),
        pytest.param(
            lambda: nf4_linear(X, W, numerics="exakt"),  # type: ignore[arg-type]
            "numerics must be exact or fast, got 'exakt'",
            id="numerics",
        ),
        pytest.param(
            lambda: nf4_linear(X, quantize(torch.ones(2, 4, 128))),
            r"weight must be \[N, K\], got \[2, 4, 128\]",
            id="stacked",
        ),
        pytest.param(
            lambda: NF4Linear(W)(X[:, 1:]), r"x must be \[\.\.\., 128\] .* got", id="module-width"
        ),
        pytest.param(
            lambda: NF4Linear(W, weight_residency="fp32"),  # type: ignore[arg-type]
            "weight_residency must be nf4, bf16 or auto, got 'fp32'",
            id="residency",
        ),
    ],
)
def test_wrong_argument_is_named_in_the_error(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
