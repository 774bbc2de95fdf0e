"""Dropout whose mask is a function of (seed, row, column): regenerated, never stored."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def drop(x, seed_ptr, offs_m, offs_k, threshold, scale):
    """Zero or scale the elements of a tile, fp32, at rows ``offs_m`` and columns ``offs_k``."""
    zero = tl.zeros(x.shape, tl.uint32)
    row = zero + offs_m.to(tl.uint32)[:, None]
    column = zero + offs_k.to(tl.uint32)[None, :]
    random, _, _, _ = tl.philox(tl.load(seed_ptr), column, row, zero, zero)
    # the top 31 bits: the comparison is one of non-negative integers
    kept = (random >> 1).to(tl.int32) >= threshold
    return tl.where(kept, x * scale, 0.0)


@triton.jit(do_not_specialize=["M"])
def _counter_dropout_kernel(
    x_ptr, seed_ptr, y_ptr, M, K, threshold, scale, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    keep = (offs_m < M)[:, None] & (offs_k < K)[None, :]
    offs = offs_m.to(tl.int64)[:, None] * K + offs_k[None, :]
    x = tl.load(x_ptr + offs, mask=keep, other=0.0).to(tl.float32)
    y = drop(x, seed_ptr, offs_m, offs_k, threshold, scale)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=keep)


def threshold_and_scale(p: float) -> tuple[int, float]:
    """What :func:`drop` takes for a share ``p`` of zeros."""
    return int(p * 2**31), 1 / (1 - p)


def counter_dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """Launch the kernel; arguments are those of the reference of the same name."""
    x = x.contiguous()
    M, K = x.shape
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    _counter_dropout_kernel[(triton.cdiv(M, 4), triton.cdiv(K, 512))](
        x, seed.view(1), y, M, K, *threshold_and_scale(p), BLOCK_M=4, BLOCK_K=512, num_warps=4
    )
    return y
