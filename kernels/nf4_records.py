"""NF4 records (``tli_engine.reference.nf4_records``) to the weight's values, row by row.

For matmuls by cuBLAS: of many rows, of an input in fp32, and of a gradient without a transposed copy.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tli_engine.kernels.nf4_tile import CODES, code_of, round_to
from tli_engine.kernels.overlap import INTERPRET


@triton.jit
def _code(nibble, table_ptr, PORTABLE: tl.constexpr):
    """The code of a nibble: a line of 64 bytes, which stays in the first cache."""
    if PORTABLE:
        return code_of(nibble)
    return tl.load(table_ptr + nibble)


@triton.jit
def _dequantize_records_kernel(
    record_ptr, table_ptr, weight_ptr, stride_n, columns, PORTABLE: tl.constexpr
):
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    # a record a program; int64: a head passes 2**31 weights
    block, column = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = (block * columns + column) * (2304 // 4)
    # words by [warp, row, thread of four, step], each of [part, half, weight]
    index = tl.arange(0, 512)
    word = tl.load(record_ptr + start + index)
    # scales by [warp, row, half]
    scale_ptr = record_ptr + start + 512 + (index // 16) * 2
    low = tl.load(scale_ptr).to(tl.float32, bitcast=True)
    high = tl.load(scale_ptr + 1).to(tl.float32, bitcast=True)
    a = _pair(word, low, 0, table_ptr, dtype, PORTABLE)
    b = _pair(word, high, 8, table_ptr, dtype, PORTABLE)
    c = _pair(word, low, 16, table_ptr, dtype, PORTABLE)
    d = _pair(word, high, 24, table_ptr, dtype, PORTABLE)
    # [warp, row, thread, step, weight, half, part] to rows and columns of the block
    values = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (4, 8, 4, 4, 2, 2, 2))
    values = tl.reshape(tl.permute(values, (0, 5, 1, 3, 6, 2, 4)), (64, 64))
    offs = (
        (block * 64 + tl.arange(0, 64)[:, None]) * stride_n
        + column * 64
        + tl.arange(0, 64)[None, :]
    )
    tl.store(weight_ptr + offs, values)


@triton.jit
def _pair(word, scale, shift: tl.constexpr, table_ptr, dtype: tl.constexpr, PORTABLE: tl.constexpr):
    """The two weights of a byte, [512] to [512, 2]."""
    first = _code((word >> (shift + 4)) & 15, table_ptr, PORTABLE)
    second = _code((word >> shift) & 15, table_ptr, PORTABLE)
    return round_to(tl.join(first * scale, second * scale), dtype, PORTABLE)


@cache
def _table(device: torch.device) -> Tensor:
    return torch.tensor(CODES, device=device)


def dequantize_records(records: Tensor, N: int, K: int, dtype: torch.dtype) -> Tensor:
    """Return the weight ``[N, K]`` of forward records in fp32, fp16 or bf16, one rounding each."""
    weight = torch.empty(N, K, dtype=dtype, device=records.device)
    dequantize_records_into(weight, records)
    return weight


def dequantize_records_into(weight: Tensor, records: Tensor) -> None:
    """Fill ``weight``, ``[N, K]``, its rows any distance apart, from forward records."""
    N, K = weight.shape
    _dequantize_records_kernel[(N // 64, K // 64)](
        records.view(torch.int32),
        _table(records.device),
        weight,
        weight.stride(0),
        records.shape[1],
        PORTABLE=INTERPRET,
        num_warps=4,
        enable_fp_fusion=False,
    )
