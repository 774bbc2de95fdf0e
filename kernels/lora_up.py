"""LoRA's way up added to the frozen product's fp32 sums: ``x @ W.T + s @ B.T``, rounded once.

Added to a product that is rounded already, an update under half a unit in its last place is lost:
in bf16 one under 1/512 of the product, which it is for the first steps of a training.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tli_engine.kernels.lora_down import width
from tli_engine.kernels.lora_up_backward import group_ends
from tli_engine.kernels.nf4_tile import dot, round_to
from tli_engine.kernels.overlap import INTERPRET


@triton.jit(do_not_specialize=["M"])
def _lora_up_kernel(
    sums_ptr,
    s_ptr,
    lora_b_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    group_1,
    group_2,
    R: tl.constexpr,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rank = tl.arange(0, WIDTH)
    row = offs_m.to(tl.int64)[:, None]
    keep_m, keep_n = (offs_m < M)[:, None], (offs_n < N)[None, :]
    dtype: tl.constexpr = s_ptr.dtype.element_ty
    s = tl.load(s_ptr + row * RANKS + rank[None, :], mask=keep_m & (rank < RANKS), other=0.0)
    # block-diagonal: a column of y takes the ranks of its own group
    group = (offs_n >= group_1).to(tl.int32) + (offs_n >= group_2).to(tl.int32)
    keep_b = (rank[:, None] // R == group[None, :]) & keep_n
    b_ptrs = lora_b_ptr + offs_n[None, :] * R + (rank % R)[:, None]
    b = round_to(tl.load(b_ptrs, mask=keep_b, other=0.0).to(tl.float32), dtype, PORTABLE)
    y = dot(s, b, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PORTABLE)
    offs = row * N + offs_n[None, :]
    keep = keep_m & keep_n
    y += tl.load(sums_ptr + offs, mask=keep, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offs, round_to(y, dtype, PORTABLE), mask=keep)


def lora_up(
    sums: Tensor, s: Tensor, lora_B: Tensor, bias: Tensor | None, sizes: list[int]
) -> Tensor:
    """Return ``sums + s @ B.T + bias``, ``[M, N]`` in ``s``'s dtype, ``B`` block-diagonal.

    Args:
        sums: ``[M, N]``, fp32, contiguous.
        s: ``[M, groups * r]``, contiguous, 16 bits; at most three groups and 64 ranks.
        lora_B: ``[N, r]``, rounded to ``s``'s dtype.
        bias: ``[N]``, or None.
        sizes: Rows of ``B`` of each group.
    """
    (M, N), rank = sums.shape, lora_B.shape[1]
    y = torch.empty(M, N, dtype=s.dtype, device=s.device)
    block_m, block_n = 32, 128
    _lora_up_kernel[(triton.cdiv(M, block_m), triton.cdiv(N, block_n))](
        sums,
        s,
        lora_B.contiguous(),
        s if bias is None else bias.contiguous(),
        y,
        M,
        N,
        *group_ends(sizes),
        R=rank,
        RANKS=s.shape[1],
        WIDTH=width(s.shape[1]),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        HAS_BIAS=bias is not None,
        PORTABLE=INTERPRET,
        num_warps=4,
    )
    return y
