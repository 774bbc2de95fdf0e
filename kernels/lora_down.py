"""LoRA's way down for few rows, ``x @ A.T``, and its gradient for ``A``.

``A`` is scaled and rounded, and ``x`` dropped out, on the way in, so that an adapter in fp32 and a
mask cost no launch of their own. The contraction is split over the GPU, since one program for some
rows would read a few GB a second; the last one to arrive adds the parts, in order. Many rows are for
cuBLAS, which reads ``x`` at the memory's speed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tli_engine.kernels.counter_dropout import drop, threshold_and_scale
from tli_engine.kernels.nf4_tile import dot, round_to
from tli_engine.kernels.overlap import INTERPRET, follow, overlap
from tli_engine.kernels.split_sum import LOCKS, arrivals, split_for, sum_of_parts

_MAX_ROWS = 256
_MAX_RANKS = 64


@triton.jit(do_not_specialize=["M"])
def _lora_down_kernel(
    x_ptr,
    lora_a_ptr,
    seed_ptr,
    s_ptr,
    part_ptr,
    lock_ptr,
    M,
    K,
    scaling,
    threshold,
    keep_scale,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    DROPOUT: tl.constexpr,
    OVERLAP: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    follow(OVERLAP)
    part = tl.program_id(1)
    steps = tl.cdiv(K, BLOCK_K)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    keep_m = (offs_m < M)[:, None]
    row = offs_m[:, None]
    rank = tl.arange(0, WIDTH)[None, :]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    for step in tl.range(part * steps // SPLIT, (part + 1) * steps // SPLIT, num_stages=3):
        offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        keep_k = offs_k < K
        x = tl.load(x_ptr + row * K + offs_k[None, :], mask=keep_m & keep_k[None, :], other=0.0)
        keep_a = keep_k[:, None] & (rank < RANKS)
        a = tl.load(lora_a_ptr + rank * K + offs_k[:, None], mask=keep_a, other=0.0)
        a = round_to(a.to(tl.float32) * scaling, dtype, PORTABLE)
        if DROPOUT:
            dropped = drop(x.to(tl.float32), seed_ptr, offs_m, offs_k, threshold, keep_scale)
            x = round_to(dropped, dtype, PORTABLE)
        acc = dot(x, a, acc, PORTABLE)
    offs = row * RANKS + rank
    keep = keep_m & (rank < RANKS)
    locks = lock_ptr + tl.program_id(0) * LOCKS
    total, is_last = sum_of_parts(acc, part_ptr, locks, part, offs, keep, M * RANKS, SPLIT)
    tl.store(s_ptr + offs, round_to(total, dtype, PORTABLE), mask=keep & is_last)


@triton.jit(do_not_specialize=["M"])
def _lora_down_backward_kernel(
    x_ptr,
    t_ptr,
    seed_ptr,
    da_ptr,
    M,
    K,
    threshold,
    keep_scale,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DROPOUT: tl.constexpr,
    OVERLAP: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    follow(OVERLAP)
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    keep_k = (offs_k < K)[None, :]
    rank = tl.arange(0, WIDTH)
    keep_r = (rank < RANKS)[:, None]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    acc = tl.zeros((WIDTH, BLOCK_K), tl.float32)
    for start in tl.range(0, M, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        keep_m = offs_m < M
        keep_x = keep_m[:, None] & keep_k
        x = tl.load(x_ptr + offs_m[:, None] * K + offs_k[None, :], mask=keep_x, other=0.0)
        if DROPOUT:
            dropped = drop(x.to(tl.float32), seed_ptr, offs_m, offs_k, threshold, keep_scale)
            x = round_to(dropped, dtype, PORTABLE)
        offs_t = offs_m[None, :] * RANKS + rank[:, None]
        t = tl.load(t_ptr + offs_t, mask=keep_m[None, :] & keep_r, other=0.0)
        acc = dot(t, x, acc, PORTABLE)
    da = round_to(acc, da_ptr.dtype.element_ty, PORTABLE)
    tl.store(da_ptr + rank[:, None] * K + offs_k[None, :], da, mask=keep_r & keep_k)


def is_narrow(x: Tensor, groups: int, rank: int) -> bool:
    """Whether LoRA's kernels take this adapter: 16 bits, three groups, 64 ranks at most."""
    sixteen_bits = x.dtype in (torch.bfloat16, torch.float16)
    return sixteen_bits and groups <= 3 and rank * groups <= _MAX_RANKS


def is_few(M: int) -> bool:
    """Whether so many rows are for these kernels, not for cuBLAS."""
    return M <= _MAX_ROWS


def width(ranks: int) -> int:
    """Columns of the tensor cores' product."""
    columns: int = triton.next_power_of_2(ranks)
    return max(16, columns)


def lora_down(
    x: Tensor, lora_A: Tensor, scaling: float, seed: Tensor | None, dropout: float
) -> Tensor:
    """Return ``D(x) @ (scaling * A).T``, ``[M, ranks]``; few contiguous rows of 16 bits."""
    (M, K), ranks = x.shape, lora_A.shape[0]
    s = torch.empty(M, ranks, dtype=x.dtype, device=x.device)
    # under 64 rows, so that Triton takes mma.sync and never leaves a product in flight
    block_m = 16 if M <= 16 else 32
    # long steps hide their latency best (H100); no longer than what an Ada GPU's shared memory takes
    block_k = 4096 // width(ranks)
    blocks = triton.cdiv(M, block_m)
    split = split_for(blocks, triton.cdiv(K, block_k))
    _lora_down_kernel[(blocks, split)](
        x,
        lora_A.contiguous(),
        x if seed is None else seed.view(1),
        s,
        torch.empty(split, M, ranks, dtype=torch.float32, device=x.device),
        arrivals(x.device, blocks),
        M,
        K,
        scaling,
        *threshold_and_scale(dropout),
        RANKS=ranks,
        WIDTH=width(ranks),
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        SPLIT=split,
        DROPOUT=seed is not None,
        PORTABLE=INTERPRET,
        num_warps=8 if block_k > 128 else 4,
        **overlap(x.device),
    )
    return s


def lora_down_backward(
    x: Tensor, t: Tensor, seed: Tensor | None, dropout: float, dtype: torch.dtype
) -> Tensor:
    """Return ``t.T @ D(x)``, ``[ranks, K]`` in ``dtype``: the gradient of ``A``."""
    (M, K), ranks = x.shape, t.shape[1]
    da = torch.empty(ranks, K, dtype=dtype, device=x.device)
    block_k = 64
    _lora_down_backward_kernel[(triton.cdiv(K, block_k),)](
        x,
        t,
        x if seed is None else seed.view(1),
        da,
        M,
        K,
        *threshold_and_scale(dropout),
        RANKS=ranks,
        WIDTH=width(ranks),
        BLOCK_M=64,
        BLOCK_K=block_k,
        DROPOUT=seed is not None,
        PORTABLE=INTERPRET,
        num_warps=4,
        **overlap(x.device),
    )
    return da
