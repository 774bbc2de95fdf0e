from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tli_engine import nf4, nf4_quantize
from tli_engine.nf4 import CODE, DTYPES

pytest.importorskip("triton")
from tli_engine.kernels.nf4_quantize import nf4_quantize as triton_nf4_quantize

THRESHOLDS = (CODE[:-1] + CODE[1:]) / 2


def next_to_thresholds() -> Tensor:
    """Blocks of absmax 1: each threshold, and one fp32 step to either side."""
    up = torch.nextafter(THRESHOLDS, torch.tensor(2.0))
    down = torch.nextafter(THRESHOLDS, torch.tensor(-2.0))
    block = torch.cat([torch.ones(1), THRESHOLDS, up, down, torch.zeros(18)])
    return torch.stack([block, -block])


WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "even": lambda: torch.randn(8, 64),
    "short-last-block": lambda: torch.randn(3, 70),
    "odd": lambda: torch.randn(7, 33),
    "one-element": lambda: torch.randn(1, 1),
    "zero": lambda: torch.zeros(2, 64),
    "zero-short-block": lambda: torch.cat([torch.randn(64), torch.zeros(6)])[None],
    "subnormal": lambda: torch.randn(2, 64) * 1e-40,
    "huge": lambda: torch.randn(2, 64).sign() * torch.finfo(torch.float32).max,
    "next-to-thresholds": next_to_thresholds,
    "codes": lambda: CODE.repeat(1, 8) * 3.7,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_triton_gives_the_reference_bits(name: str, device: torch.device) -> None:
    dense = WEIGHTS[name]().to(device)
    expected = nf4.quantize(dense)
    for packed, absmax in (
        triton_nf4_quantize(dense, 64),
        torch.ops.tli_engine.nf4_quantize.default(dense, 64),
    ):
        assert torch.equal(packed, expected.packed)
        assert torch.equal(absmax, expected.absmax)


@pytest.mark.parametrize("block_size", [32, 256, 1024])
def test_other_block_sizes_and_dtypes(block_size: int, device: torch.device) -> None:
    for dtype in DTYPES:
        dense = torch.randn(3, 520, device=device).to(dtype)
        packed, absmax = triton_nf4_quantize(dense, block_size)
        expected = nf4.quantize(dense, block_size=block_size)
        assert torch.equal(packed, expected.packed)
        assert torch.equal(absmax, expected.absmax)


def test_quantising_what_was_dequantised_changes_nothing(device: torch.device) -> None:
    weight = nf4_quantize(torch.randn(4, 128, device=device))
    again = nf4_quantize(weight.dequantize(torch.float32))
    assert torch.equal(again.packed, weight.packed)
    assert torch.equal(again.absmax, weight.absmax)


@pytest.mark.parametrize("double_quant", [False, True])
def test_public_function_is_that_of_the_format(double_quant: bool, device: torch.device) -> None:
    dense = torch.randn(300, 128, device=device, dtype=torch.bfloat16)
    actual = nf4_quantize(dense.T.contiguous().T, double_quant=double_quant)
    expected = nf4.quantize(dense, double_quant=double_quant)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(actual.packed, expected.packed)
    assert torch.equal(actual.absmax_fp32(), expected.absmax_fp32())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_reaches_absmax_and_is_refused(bad: float, device: torch.device) -> None:
    dense = torch.randn(3, 70, device=device)
    dense[1, 3] = bad
    for _, absmax in (
        triton_nf4_quantize(dense, 64),
        torch.ops.tli_engine.nf4_quantize.default(dense, 64),
    ):
        assert (~absmax.isfinite()).nonzero().tolist() == [[1]]
    with pytest.raises(ValueError, match=r"weight must be finite, got .* at \[1, 3\]"):
        nf4_quantize(dense)


@pytest.mark.parametrize("shape", [(3, 70), (4, 64), (1, 1)], ids=str)
def test_operator_contract(shape: tuple[int, int], device: torch.device) -> None:
    dense = torch.randn(shape, device=device)
    torch.library.opcheck(torch.ops.tli_engine.nf4_quantize.default, (dense, 64))


def test_there_is_no_gradient(device: torch.device) -> None:
    dense = torch.randn(3, 70, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.tli_engine.nf4_quantize.default, (dense, 64))
    results = torch.ops.tli_engine.nf4_quantize.default(dense, 64)
    assert [t.requires_grad for t in results] == [False, False]
    weight = nf4_quantize(dense, double_quant=True)
    nested = weight.nested
    assert nested is not None
    parts = (weight.packed, weight.absmax, nested.absmax, nested.code, nested.offset)
    assert not any(t.requires_grad for t in parts)
    assert torch.equal(weight.packed, nf4.quantize(dense).packed)


@pytest.mark.gpu
def test_elements_past_32_bits() -> None:
    rows = 2**25 + 1
    dense = torch.zeros(rows, 64, device="cuda", dtype=torch.float16)
    dense[0].normal_()
    dense[-1].normal_()
    assert dense.numel() > 2**31
    weight = nf4_quantize(dense)
    for row in (0, rows - 1):
        expected = nf4.quantize(dense[row])
        assert torch.equal(weight.packed[row * 32 : (row + 1) * 32], expected.packed)
        assert weight.absmax[row] == expected.absmax[0]
    # the code of zero in both halves
    assert torch.equal(weight.packed[32:-32].unique().cpu(), torch.tensor([0x77]).byte())


def test_wrong_argument_is_named_in_the_error(device: torch.device) -> None:
    with pytest.raises(ValueError, match="block_size must be one of"):
        nf4_quantize(torch.randn(2, 64, device=device), block_size=48)
    with pytest.raises(ValueError, match=r"got torch\.int32"):
        nf4_quantize(torch.zeros(2, 64, device=device, dtype=torch.int32))
