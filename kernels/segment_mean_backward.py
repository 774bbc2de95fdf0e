"""Gradient of a weighted mean for its rows: each segment's row of it, times each row's share.

A program takes some columns of one segment and reads them once, whatever the number of rows. Rows
beyond the last segment, which fill a pack up, are cleared by all programs together.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tli_engine.kernels.nf4_tile import round_to
from tli_engine.kernels.overlap import INTERPRET
from tli_engine.kernels.segment_mean import block_d_for, divide, triton_acc_of


@triton.jit
def total_of(weight_ptr, first, last, BLOCK_T: tl.constexpr, ACC: tl.constexpr):
    """Total weight of a segment, 1 for one of none."""
    total = tl.full((), 0, ACC)
    for start in tl.range(first, last, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        total += tl.sum(tl.load(weight_ptr + offs_t, mask=offs_t < last, other=0.0).to(ACC))
    return tl.where(total == 0, 1, total)


@triton.jit
def clear_rows(dx_ptr, offs_d, keep_d, D, first, T, step):
    """Write zeros to every so many-th row."""
    for row in tl.range(first, T, step):
        tl.store(dx_ptr + row * D + offs_d, tl.zeros(offs_d.shape, tl.float32), mask=keep_d)


@triton.jit(do_not_specialize=["T"])
def _segment_mean_bwd_kernel(
    dmean_ptr,
    weight_ptr,
    offsets_ptr,
    dx_ptr,
    T,
    D,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ACC: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    segment, S = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    first = tl.load(offsets_ptr + segment)
    last = tl.load(offsets_ptr + segment + 1)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    keep_d = offs_d < D
    dmean = tl.load(dmean_ptr + segment * D + offs_d, mask=keep_d, other=0.0)
    total = total_of(weight_ptr, first, last, BLOCK_T, ACC)
    for row in tl.range(first, last):
        share = divide(tl.load(weight_ptr + row).to(ACC), total)
        dx = round_to(dmean * share, dx_ptr.dtype.element_ty, PORTABLE)
        tl.store(dx_ptr + row * D + offs_d, dx, mask=keep_d)
    clear_rows(dx_ptr, offs_d, keep_d, D, tl.load(offsets_ptr + S) + segment, T, S)


def segment_mean_backward(
    dmean: Tensor, weight: Tensor, offsets: Tensor, dtype: torch.dtype
) -> Tensor:
    """Launch; the arguments are those of ``tli_engine::segment_mean_backward``."""
    (S, D), T = dmean.shape, weight.shape[0]
    if 0 in (S, D, T):
        return torch.zeros(T, D, dtype=dtype, device=dmean.device)
    dx = torch.empty(T, D, dtype=dtype, device=dmean.device)
    block_d = block_d_for(D)
    _segment_mean_bwd_kernel[(S, triton.cdiv(D, block_d))](
        dmean.contiguous(),
        weight.contiguous(),
        offsets.contiguous(),
        dx,
        T,
        D,
        BLOCK_D=block_d,
        BLOCK_T=32,
        ACC=triton_acc_of(dmean.dtype),
        PORTABLE=INTERPRET,
        num_warps=4,
    )
    return dx
