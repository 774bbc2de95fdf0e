import pytest
import torch
from torch import Tensor

from tli_engine import nf4_dequantize
from tli_engine.nf4 import DTYPES, NF4Weight, quantize
from tli_engine.reference.nf4_linear import tile, untile

pytest.importorskip("triton")
from tli_engine.kernels import nf4_dequantize as kernels

SHAPES = [
    pytest.param((2, 256), id="whole-tiles"),
    pytest.param((3, 70), id="short-last-block"),
    pytest.param((5, 33), id="odd"),
    pytest.param((1, 1), id="one-element"),
    pytest.param((2, 2, 64), id="stacked-experts"),
]


def launch(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    nested = weight.nested
    return kernels.nf4_dequantize(
        weight.packed,
        weight.absmax,
        nested and nested.absmax,
        nested and nested.code,
        nested and nested.offset,
        list(weight.shape),
        dtype,
        weight.block_size,
        nested.block_size if nested else 256,
    )


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_gives_the_reference_bits(
    shape: tuple[int, ...], double_quant: bool, device: torch.device
) -> None:
    weight = quantize(torch.randn(shape, device=device), double_quant=double_quant)
    for dtype in DTYPES:
        actual = launch(weight, dtype)
        assert actual.dtype == dtype
        assert torch.equal(actual, weight.dequantize(dtype))


@pytest.mark.parametrize("block_size", [32, 128, 512])
def test_other_block_sizes(block_size: int, device: torch.device) -> None:
    weight = quantize(torch.randn(4, 256, device=device), block_size=block_size)
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(launch(weight, dtype), weight.dequantize(dtype))


@pytest.mark.parametrize(("N", "K"), [(1, 128), (20, 256), (17, 640)])
def test_tiling_is_undone_bit_for_bit(N: int, K: int, device: torch.device) -> None:
    weight = quantize(torch.randn(N, K, device=device))
    tiled = tile(weight.packed, weight.absmax, N, K)
    packed, absmax = untile(*tiled, N, K)
    assert torch.equal(packed, weight.packed)
    assert torch.equal(absmax, weight.absmax)
    for dtype in (torch.float16, torch.float32):
        dense = kernels.dequantize_tiles(*tiled, N, K, dtype, 64, True)
        assert torch.equal(dense, weight.dequantize(dtype))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_absmax_that_is_not_finite_shows(bad: float, device: torch.device) -> None:
    weight = quantize(torch.randn(2, 128, device=device))
    weight.absmax[1] = bad
    for dense in (launch(weight, torch.bfloat16), nf4_dequantize(weight, torch.bfloat16)):
        assert dense[0, :64].isfinite().all()
        assert not dense[0, 64:].isfinite().any()
        assert dense[1].isfinite().all()


@pytest.mark.parametrize("double_quant", [False, True])
def test_operator_contract(double_quant: bool, device: torch.device) -> None:
    weight = quantize(torch.randn(3, 70, device=device), double_quant=double_quant)
    nested = weight.nested
    statistics = (nested.absmax, nested.code, nested.offset) if nested else (None,) * 3
    args = (weight.packed, weight.absmax, *statistics, [3, 70], torch.bfloat16, 64, 256)
    torch.library.opcheck(torch.ops.tli_engine.nf4_dequantize.default, args)


@pytest.mark.parametrize("double_quant", [False, True])
def test_there_is_no_gradient(double_quant: bool, device: torch.device) -> None:
    """Neither of the op, whatever its inputs ask for, nor by the public function, which says so."""
    weight = quantize(torch.randn(3, 70, device=device), double_quant=double_quant)
    nested = weight.nested
    statistics = (nested.absmax, nested.code, nested.offset) if nested else (None,) * 3
    asking = weight.absmax if nested is None else nested.absmax
    asking.requires_grad_()
    args = (weight.packed, weight.absmax, *statistics, [3, 70], torch.bfloat16, 64, 256)
    torch.library.opcheck(torch.ops.tli_engine.nf4_dequantize.default, args)
    assert not torch.ops.tli_engine.nf4_dequantize.default(*args).requires_grad
    with pytest.raises(ValueError, match=r"absmax must not require a gradient.*; detach it"):
        nf4_dequantize(weight)
    asking.requires_grad_(False)
    assert not nf4_dequantize(weight).requires_grad


def test_wrong_dtype_is_named_in_the_error(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"dtype must be one of .* got torch\.int8"):
        nf4_dequantize(quantize(torch.randn(2, 64, device=device)), torch.int8)


def test_mixed_devices_are_named_in_the_error() -> None:
    weight = quantize(torch.randn(2, 64))
    mixed = NF4Weight(weight.packed, weight.absmax.to("meta"), weight.shape, weight.dtype)
    with pytest.raises(ValueError, match=r"weight\.absmax must be on cpu .* got meta"):
        nf4_dequantize(mixed)
