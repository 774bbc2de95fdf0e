"""``D(t @ A)``: the gradient through LoRA's way down where dropout gives it a mask of its own."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tli_engine.kernels.counter_dropout import drop, threshold_and_scale
from tli_engine.kernels.lora_down import width
from tli_engine.kernels.nf4_tile import dot, round_to
from tli_engine.kernels.overlap import INTERPRET


@triton.jit(do_not_specialize=["M"])
def _lora_dx_kernel(
    t_ptr,
    lora_a_ptr,
    seed_ptr,
    dx_ptr,
    M,
    K,
    threshold,
    keep_scale,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ADD: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    rank = tl.arange(0, WIDTH)
    row = offs_m.to(tl.int64)[:, None]
    keep_m, keep_k = (offs_m < M)[:, None], (offs_k < K)[None, :]
    dtype: tl.constexpr = t_ptr.dtype.element_ty
    t = tl.load(t_ptr + row * RANKS + rank[None, :], mask=keep_m & (rank < RANKS), other=0.0)
    keep_a = (rank < RANKS)[:, None] & keep_k
    a = tl.load(lora_a_ptr + rank[:, None] * K + offs_k[None, :], mask=keep_a, other=0.0)
    a = round_to(a.to(tl.float32), dtype, PORTABLE)
    update = dot(t, a, tl.zeros((BLOCK_M, BLOCK_K), tl.float32), PORTABLE)
    update = drop(update, seed_ptr, offs_m, offs_k, threshold, keep_scale)
    offs = row * K + offs_k[None, :]
    keep = keep_m & keep_k
    if ADD:
        update += tl.load(dx_ptr + offs, mask=keep, other=0.0).to(tl.float32)
    tl.store(dx_ptr + offs, round_to(update, dtype, PORTABLE), mask=keep)


def lora_dx(
    t: Tensor, lora_A: Tensor, seed: Tensor, dropout: float, dx: Tensor | None = None
) -> Tensor:
    """Return ``D(t @ A)``, ``[M, K]``, or add it to ``dx`` in place; 16 bits, at most 64 ranks."""
    (M, ranks), K = t.shape, lora_A.shape[1]
    out = torch.empty(M, K, dtype=t.dtype, device=t.device) if dx is None else dx
    _lora_dx_kernel[(triton.cdiv(M, 32), triton.cdiv(K, 128))](
        t,
        lora_A.contiguous(),
        seed.view(1),
        out,
        M,
        K,
        *threshold_and_scale(dropout),
        RANKS=ranks,
        WIDTH=width(ranks),
        BLOCK_M=32,
        BLOCK_K=128,
        ADD=dx is not None,
        PORTABLE=INTERPRET,
        num_warps=4,
    )
    return out
