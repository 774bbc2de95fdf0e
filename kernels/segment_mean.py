"""Weighted mean of the rows of each segment: one pass over the rows, whatever their dtype.

Plain PyTorch widens the rows, multiplies and masks them in memory before it adds them up. Here a
program takes some columns of one segment, and nothing but the means is written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tli_engine.kernels.dense_rows import with_dense_rows

# rows whose loads a program has under way at once
UNROLL = 8


@triton.jit
def divide(a, b):
    """Divide with one rounding; Triton's own fp32 division is off by up to two units."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    return a / b


@triton.jit
def mean_of(
    x_ptr, weight_ptr, offsets_ptr, segment, offs_d, keep_d, stride, UNROLL: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Mean of a segment's rows, some columns; zeros for a segment of no weight."""
    first = tl.load(offsets_ptr + segment)
    last = tl.load(offsets_ptr + segment + 1)
    acc = tl.zeros(offs_d.shape, ACC)
    total = tl.full((), 0, ACC)
    for start in tl.range(first, last, UNROLL):
        for i in tl.static_range(UNROLL):
            row = start + i
            w = tl.load(weight_ptr + row, mask=row < last, other=0.0).to(ACC)
            x_ptrs = x_ptr + row * stride + offs_d
            x = tl.load(x_ptrs, mask=keep_d & (row < last), other=0.0).to(ACC)
            # not the product alone: a row left out may be infinite
            acc += tl.where(w != 0, x * w, 0.0)
            total += w
    return divide(acc, tl.where(total == 0, 1, total) + tl.zeros(offs_d.shape, ACC))


@triton.jit
def _segment_mean_fwd_kernel(
    x_ptr,
    weight_ptr,
    offsets_ptr,
    mean_ptr,
    D,
    stride_xt,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
    ACC: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    keep_d = offs_d < D
    mean = mean_of(x_ptr, weight_ptr, offsets_ptr, segment, offs_d, keep_d, stride_xt, UNROLL, ACC)
    tl.store(mean_ptr + segment * D + offs_d, mean, mask=keep_d)


def block_d_for(D: int) -> int:
    """Columns a program takes."""
    columns: int = triton.next_power_of_2(D)
    return min(columns, 1024)


def acc_of(dtype: torch.dtype) -> torch.dtype:
    """What rows of ``dtype`` are added up in."""
    return torch.promote_types(dtype, torch.float32)


def triton_acc_of(dtype: torch.dtype) -> tl.dtype:
    """The same, as Triton names it."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def segment_mean(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Launch; the arguments are those of :func:`tli_engine.ops.segment_mean`, checked."""
    S, D = offsets.shape[0] - 1, x.shape[1]
    mean = torch.empty(S, D, dtype=acc_of(x.dtype), device=x.device)
    if mean.numel() == 0:
        return mean
    x = with_dense_rows(x)
    block_d = block_d_for(D)
    _segment_mean_fwd_kernel[(S, triton.cdiv(D, block_d))](
        x,
        weight.contiguous(),
        offsets.contiguous(),
        mean,
        D,
        x.stride(0),
        BLOCK_D=block_d,
        UNROLL=UNROLL,
        ACC=triton_acc_of(x.dtype),
        num_warps=4,
    )
    return mean
