"""``x @ W.T`` with an NF4 weight that is decoded in registers.

Where few rows share a weight, reading it is the cost: 0.56 bytes a weight here, against the 0.56
read, 2 written and 2 read again of dequantising first. A LoRA update rides along in the accumulators.
Sums over split-off parts of the contraction are stored apart and added in a fixed order, so that
equal inputs give equal bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tli_engine.kernels.keep_decoded import for_forward
from tli_engine.kernels.lora_down import width
from tli_engine.kernels.lora_up_backward import group_ends
from tli_engine.kernels.nf4_dequantize import dequantize_tiles
from tli_engine.kernels.nf4_dispatch import Tile, choose_tile, fast_table
from tli_engine.kernels.nf4_tile import (
    column_to_k,
    decode_tile,
    dot,
    load_scale,
    load_table,
    round_to,
    word_offsets,
)
from tli_engine.kernels.overlap import INTERPRET, follow, overlap


@triton.jit(do_not_specialize=["M"])
def _nf4_linear_fwd_kernel(
    x_ptr,
    word_ptr,
    absmax_ptr,
    table_ptr,
    bias_ptr,
    lora_x_ptr,
    lora_b_ptr,
    y_ptr,
    M,
    N,
    K,
    group_1,
    group_2,
    one,
    R: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILED: tl.constexpr,
    FAST: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    # W is the left operand: its decoded registers feed the tensor cores, 64 rows at a time
    pid_m = tl.program_id(0) % tl.cdiv(M, BLOCK_M)
    pid_n = tl.program_id(0) // tl.cdiv(M, BLOCK_M)
    part = tl.program_id(1)
    first = part * (K // 128) // SPLIT
    last = (part + 1) * (K // 128) // SPLIT
    # without it ptxas sees a loop of no turns, and waits for every wgmma (C7515; Triton 3.6)
    tl.assume(last > first)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    keep_m = offs_m < M
    keep_n = offs_n < N
    offs_k = tl.arange(0, 128)
    if not TILED:
        offs_k = column_to_k(offs_k)
    x_ptr += offs_m.to(tl.int64)[None, :] * K + offs_k[:, None]
    t = table_ptr
    if FAST:
        t = load_table(table_ptr)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if RANKS > 0:
        # B is block-diagonal over the groups of rows: a row meets its own group's columns of x A^T
        rank = tl.arange(0, RANKS)
        own = (
            rank
            - R * ((offs_n >= group_1).to(tl.int32) + (offs_n >= group_2).to(tl.int32))[:, None]
        )
        keep_b = keep_n[:, None] & (own >= 0) & (own < R)
        lora_b = tl.load(lora_b_ptr + offs_n[:, None] * R + own, mask=keep_b, other=0.0).to(dtype)
        width = R * (1 + (group_1 < N).to(tl.int32) + (group_2 < N).to(tl.int32))
        offs_s = offs_m.to(tl.int64)[None, :] * width + rank[:, None]
        keep_s = keep_m[None, :] & (rank < width)[:, None] & (part == 0)
        lora_x = tl.load(lora_x_ptr + offs_s, mask=keep_s, other=0.0)
        acc = dot(lora_b, lora_x, acc, PORTABLE)
    for tile in tl.range(first, last, num_stages=STAGES):
        offs = word_offsets(offs_n, tile, N, K, TILED)
        word = tl.load(word_ptr + offs, mask=keep_n[:, None], other=0)
        scale = load_scale(absmax_ptr, offs_n, tile, keep_n, N, K, BLOCK_N, TILED)
        x = tl.load(x_ptr + tile * 128, mask=keep_m[None, :], other=0.0)
        w = decode_tile(word, scale, t, BLOCK_N, dtype, FAST, PORTABLE)
        # added apart, so that every step waits for its products: accumulated in place, Triton 3.6
        # leaves 7 wgmma in flight, and the next step decodes into the registers that they read
        # (seen on an H200: BLOCK_M 128, fast, K = 4096, 4 % off). The factor, 1 at run time,
        # keeps the compiler from folding the sum back.
        product = dot(w, x, tl.zeros((BLOCK_N, BLOCK_M), tl.float32), PORTABLE)
        acc += product * one
    keep = keep_n[:, None] & keep_m[None, :]
    offs = offs_m.to(tl.int64)[None, :] * N + offs_n[:, None]
    if SPLIT == 1:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + offs_n, mask=keep_n, other=0.0).to(tl.float32)[:, None]
        tl.store(y_ptr + offs, round_to(acc, y_ptr.dtype.element_ty, PORTABLE), mask=keep)
    else:
        tl.store(y_ptr + part.to(tl.int64) * M * N + offs, acc, mask=keep)


@triton.jit(do_not_specialize=["numel"])
def _sum_parts_kernel(
    part_ptr,
    bias_ptr,
    y_ptr,
    numel,
    N,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OVERLAP: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    follow(OVERLAP)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = offs < numel
    total = tl.load(part_ptr + offs, mask=keep, other=0.0)
    for _ in tl.static_range(1, SPLIT):
        part_ptr += numel
        total += tl.load(part_ptr + offs, mask=keep, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + offs % N, mask=keep, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, round_to(total, y_ptr.dtype.element_ty, PORTABLE), mask=keep)


def sum_parts(parts: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Add the parts ``[SPLIT, M, N]`` in order, and the bias, into ``y``."""
    _sum_parts_kernel[(triton.cdiv(y.numel(), 1024),)](
        parts,
        parts if bias is None else bias.contiguous(),
        y,
        y.numel(),
        y.shape[1],
        SPLIT=parts.shape[0],
        BLOCK=1024,
        HAS_BIAS=bias is not None,
        PORTABLE=INTERPRET,
        num_warps=4,
        **overlap(y.device),
    )


def fused_forward(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    N: int,
    tiled: bool,
    fast: bool,
    tile: Tile,
    lora: tuple[Tensor, Tensor, list[int]] | None = None,
) -> Tensor:
    """Launch the fused kernel; ``lora`` is ``(s x A^T, B, sizes)``, added as it is."""
    M, K = x.shape
    split = tile.split
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    out = y if split == 1 else x.new_empty(split, M, N, dtype=torch.float32)
    lora_x, lora_b, sizes = lora or (x, x, [N])
    rank = lora_b.shape[1] if lora else 1
    _nf4_linear_fwd_kernel[(triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n), split)](
        x,
        packed.view(-1).view(torch.int32),
        absmax,
        fast_table(x) if fast else x,
        x if bias is None else bias.contiguous(),
        lora_x,
        lora_b,
        out,
        M,
        N,
        K,
        *group_ends(sizes),
        1.0,
        R=rank,
        RANKS=width(rank * len(sizes)) if lora else 0,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        SPLIT=split,
        STAGES=tile.num_stages,
        HAS_BIAS=bias is not None and split == 1,
        TILED=tiled,
        FAST=fast,
        PORTABLE=INTERPRET,
        num_warps=tile.num_warps,
    )
    if split > 1:
        sum_parts(out, bias, y)
    return y


def nf4_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    N: int,
    block_size: int,
    tiled: bool,
    fast: bool,
) -> Tensor:
    """Launch what suits the shape; arguments are those of ``tli_engine::nf4_linear``."""
    x = x.contiguous()
    M, K = x.shape
    if M == 0 or N == 0:
        return x.new_empty(M, N)
    tile = choose_tile("fwd", x, M, N, K, block_size, absmax)
    if tile is None:
        stored = (packed, absmax, N, K, x.dtype, block_size, tiled)
        weight = for_forward(packed, x.dtype, lambda: dequantize_tiles(*stored))
        return torch.nn.functional.linear(x, weight, bias)
    return fused_forward(x, packed, absmax, bias, N, tiled, fast, tile)
