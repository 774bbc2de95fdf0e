"""Gradient of a weighted mean for its rows: each segment's row of it, times each row's share.

A program takes some columns of one segment and reads them once, whatever the number of rows. A
scalar that the gradient has yet to be multiplied by is multiplied in on the way.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tli_engine.kernels.nf4_tile import round_to
from tli_engine.kernels.segment_mean import block_d_for, divide, triton_acc_of

INTERPRET = bool(triton.knobs.runtime.interpret)


@triton.jit
def _segment_mean_bwd_kernel(
    dmean_ptr,
    weight_ptr,
    offsets_ptr,
    scale_ptr,
    dx_ptr,
    D,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ACC: tl.constexpr,
    SCALED: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    first = tl.load(offsets_ptr + segment)
    last = tl.load(offsets_ptr + segment + 1)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    keep_d = offs_d < D
    dmean = tl.load(dmean_ptr + segment * D + offs_d, mask=keep_d, other=0.0)
    if SCALED:
        dmean *= tl.load(scale_ptr)
    total = tl.full((), 0, ACC)
    for start in tl.range(first, last, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        total += tl.sum(tl.load(weight_ptr + offs_t, mask=offs_t < last, other=0.0).to(ACC))
    total = tl.where(total == 0, 1, total)
    for row in tl.range(first, last):
        share = divide(tl.load(weight_ptr + row).to(ACC), total)
        dx = round_to(dmean * share, dx_ptr.dtype.element_ty, PORTABLE)
        tl.store(dx_ptr + row * D + offs_d, dx, mask=keep_d)


def spread(
    dmean: Tensor, weight: Tensor, offsets: Tensor, dtype: torch.dtype, scale: Tensor | None
) -> Tensor:
    """Launch; ``scale`` is a scalar of ``dmean``'s dtype, or ``None`` for 1."""
    (S, D), T = dmean.shape, weight.shape[0]
    dx = torch.empty(T, D, dtype=dtype, device=dmean.device)
    if dx.numel() == 0:
        return dx
    dmean = dmean.contiguous()
    block_d = block_d_for(D)
    _segment_mean_bwd_kernel[(S, triton.cdiv(D, block_d))](
        dmean,
        weight.contiguous(),
        offsets.contiguous(),
        dmean if scale is None else scale,
        dx,
        D,
        BLOCK_D=block_d,
        BLOCK_T=32,
        ACC=triton_acc_of(dmean.dtype),
        SCALED=scale is not None,
        PORTABLE=INTERPRET,
        num_warps=4,
    )
    return dx


def segment_mean_backward(
    dmean: Tensor, weight: Tensor, offsets: Tensor, dtype: torch.dtype
) -> Tensor:
    """Launch; the arguments are those of ``tli_engine::segment_mean_backward``."""
    return spread(dmean, weight, offsets, dtype, None)
