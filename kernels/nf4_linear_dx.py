"""``dy @ W`` with an NF4 weight: the gradient of ``nf4_linear`` for its input.

The weight is read once, decoded in registers, and passes through shared memory to the tensor cores,
which contract over its rows. bitsandbytes and Unsloth write it out in full for this.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tli_engine.kernels.keep_decoded import for_backward
from tli_engine.kernels.lora_down import width
from tli_engine.kernels.nf4_dequantize import dequantize_tiles
from tli_engine.kernels.nf4_dispatch import Tile, choose_tile, fast_table
from tli_engine.kernels.nf4_linear import sum_parts
from tli_engine.kernels.nf4_tile import (
    column_to_k,
    decode_tile,
    dot,
    load_scale,
    load_table,
    round_to,
    word_offsets,
)
from tli_engine.kernels.overlap import INTERPRET


@triton.jit(do_not_specialize=["M"])
def _nf4_linear_dx_kernel(
    dy_ptr,
    word_ptr,
    absmax_ptr,
    table_ptr,
    lora_t_ptr,
    lora_a_ptr,
    dx_ptr,
    M,
    N,
    K,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    TILED: tl.constexpr,
    FAST: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    pid_m = tl.program_id(0) % tl.cdiv(M, BLOCK_M)
    tile = tl.program_id(0) // tl.cdiv(M, BLOCK_M)
    part = tl.program_id(1)
    steps = tl.cdiv(N, BLOCK_N)
    first = part * steps // SPLIT
    last = (part + 1) * steps // SPLIT
    # as in nf4_linear
    tl.assume(last > first)
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    keep_m = offs_m < M
    t = table_ptr
    if FAST:
        t = load_table(table_ptr)
    offs_k = tl.arange(0, 128)
    if not TILED:
        offs_k = column_to_k(offs_k)
    offs_k += tile * 128
    acc = tl.zeros((BLOCK_M, 128), tl.float32)
    if RANKS > 0:
        rank = tl.arange(0, WIDTH)
        offs_t = offs_m.to(tl.int64)[:, None] * RANKS + rank[None, :]
        keep_t = keep_m[:, None] & (rank < RANKS)[None, :] & (part == 0)
        lora_t = tl.load(lora_t_ptr + offs_t, mask=keep_t, other=0.0)
        offs_a = rank[:, None] * K + offs_k[None, :]
        lora_a = tl.load(lora_a_ptr + offs_a, mask=(rank < RANKS)[:, None], other=0.0)
        lora_a = round_to(lora_a.to(tl.float32), dtype, PORTABLE)
        acc = dot(lora_t, lora_a, acc, PORTABLE)
    for step in tl.range(first, last, num_stages=STAGES):
        offs_n = step * BLOCK_N + tl.arange(0, BLOCK_N)
        keep_n = offs_n < N
        words = word_offsets(offs_n, tile, N, K, TILED)
        word = tl.load(word_ptr + words, mask=keep_n[:, None], other=0)
        scale = load_scale(absmax_ptr, offs_n, tile, keep_n, N, K, BLOCK_N, TILED)
        offs_dy = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
        dy = tl.load(dy_ptr + offs_dy, mask=keep_m[:, None] & keep_n[None, :], other=0.0)
        w = decode_tile(word, scale, t, BLOCK_N, dtype, FAST, PORTABLE)
        acc = dot(dy, w, acc, PORTABLE)
    offs = offs_m.to(tl.int64)[:, None] * K + offs_k[None, :]
    if SPLIT == 1:
        value = round_to(acc, dx_ptr.dtype.element_ty, PORTABLE)
        tl.store(dx_ptr + offs, value, mask=keep_m[:, None])
    else:
        tl.store(dx_ptr + part.to(tl.int64) * M * K + offs, acc, mask=keep_m[:, None])


def fused_dx(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    K: int,
    tiled: bool,
    fast: bool,
    tile: Tile,
    lora: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Launch the fused kernel; ``lora`` is ``(t, A)``: it adds ``t @ A``."""
    M, N = dy.shape
    dx = torch.empty(M, K, dtype=dy.dtype, device=dy.device)
    out = dx if tile.split == 1 else dy.new_empty(tile.split, M, K, dtype=torch.float32)
    lora_t, lora_a = lora or (dy, dy)
    ranks = lora_t.shape[1] if lora else 0
    _nf4_linear_dx_kernel[(triton.cdiv(M, tile.block_m) * (K // 128), tile.split)](
        dy,
        packed.view(-1).view(torch.int32),
        absmax,
        fast_table(dy) if fast else dy,
        lora_t,
        lora_a,
        out,
        M,
        N,
        K,
        RANKS=ranks,
        WIDTH=width(ranks),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        SPLIT=tile.split,
        STAGES=tile.num_stages,
        TILED=tiled,
        FAST=fast,
        PORTABLE=INTERPRET,
        num_warps=tile.num_warps,
    )
    if tile.split > 1:
        sum_parts(out, None, dx)
    return dx


def nf4_linear_dx(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    K: int,
    block_size: int,
    tiled: bool,
    fast: bool,
) -> Tensor:
    """Launch what suits the shape; arguments are those of ``tli_engine::nf4_linear_dx``."""
    dy = dy.contiguous()
    M, N = dy.shape
    if M == 0 or N == 0:
        return dy.new_zeros(M, K)
    tile = choose_tile("dx", dy, M, N, K, block_size, absmax)
    if tile is None:
        stored = (packed, absmax, N, K, dy.dtype, block_size, tiled)
        return dy @ for_backward(packed, dy.dtype, lambda: dequantize_tiles(*stored))
    return fused_dx(dy, packed, absmax, K, tiled, fast, tile)
