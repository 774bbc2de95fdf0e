"""Gradient of the pooled alignment loss for the rows of a pack, the incoming scalar included.

Up to 64 pairs are one launch. A program takes some words of one side and some columns: it makes the
words' gradient of the cosines anew, 8 KiB of them, multiplies it by the other side's vectors and
writes every row of its words. Many pairs' gradients of the cosines go through cuBLAS in chunks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tli_engine.kernels.fp32_product import product
from tli_engine.kernels.nf4_tile import round_to
from tli_engine.kernels.overlap import INTERPRET, follow, overlap
from tli_engine.kernels.pooled_alignment_loss import UNROLL, Tile, is_few
from tli_engine.kernels.pooled_alignment_loss_backward_many import (
    pooled_alignment_loss_backward_many,
)
from tli_engine.kernels.pooled_loss import Choice, gradient_of, load_stats, locate, negatives_of


@triton.jit
def _load_weights(w_ptrs, length, turn, UNROLL: tl.constexpr):
    """Weights of some rows of each word, [W, UNROLL]."""
    i = turn + tl.arange(0, UNROLL)[None, :]
    return tl.load(w_ptrs[:, None] + i, mask=i < length[:, None], other=0.0).to(tl.float32)


@triton.jit
def _write_rows(
    dx_ptrs, dword, w, length, turn, keep_k, stride, UNROLL: tl.constexpr, PORTABLE: tl.constexpr
):
    """Some rows of each word: its gradient times their weights."""
    i = turn + tl.arange(0, UNROLL)[None, :]
    dx = round_to(dword[:, None, :] * w[:, :, None], dx_ptrs.dtype.element_ty, PORTABLE)
    ptrs = dx_ptrs[:, None, :] + (i * stride)[:, :, None]
    tl.store(ptrs, dx, mask=(i < length[:, None])[:, :, None] & keep_k[:, None, :])


@triton.jit(do_not_specialize=["N", "T"])
def _hidden_gradient_kernel(
    dloss_ptr,
    pooled_ptr,
    norm_ptr,
    cos_ptr,
    stats_ptr,
    weight_ptr,
    offsets_ptr,
    groups_ptr,
    dhidden_ptr,
    N,
    T,
    H,
    inv_temperature,
    W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    B: tl.constexpr,
    EVEN: tl.constexpr,
    UNROLL: tl.constexpr,
    INFONCE: tl.constexpr,
    WAYS: tl.constexpr,
    GROUPED: tl.constexpr,
    PORTABLE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    follow(OVERLAP)
    blocks = tl.cdiv(N, W)
    side, block = tl.program_id(1) // blocks, tl.program_id(1) % blocks
    mine, other = block * W + tl.arange(0, W), tl.arange(0, B)
    row, column = mine[:, None], other[None, :]
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    keep_k = offs_k >= 0 if EVEN else offs_k < H
    # sources are the rows of the cosines, targets their columns
    keep = (row < N) & (column < N)
    offs = tl.where(side == 0, row * N + column, column * N + row)
    cos = tl.load(cos_ptr + offs, mask=keep, other=0.0)
    negative = negatives_of(groups_ptr, row, column, keep, N, GROUPED)
    my_top, my_worth = load_stats(stats_ptr, side, mine, N, WAYS)
    top, worth = load_stats(stats_ptr, 1 - side, other, N, WAYS)
    my_norm = 1 / tl.load(norm_ptr + side * N + mine, mask=mine < N, other=1.0)
    norm = 1 / tl.load(norm_ptr + (1 - side) * N + other, mask=other < N, other=1.0)
    start, length = locate(offsets_ptr, side * N + mine, mine < N)
    keep_other = (other < N)[:, None] & keep_k
    others_ptr = pooled_ptr + (1 - side) * N * H
    others = tl.load(others_ptr + other[:, None] * H + offs_k, mask=keep_other, other=0.0)
    my_ptrs = pooled_ptr + (side * N + row) * H + offs_k
    my_pooled = tl.load(my_ptrs, mask=(row < N) & keep_k, other=0.0)
    dcos = gradient_of(
        cos, negative, keep & (row == column), my_top[:, None], my_worth[:, None], top[None, :],
        worth[None, :], inv_temperature, WAYS, INFONCE,
    )  # fmt: skip
    radial = tl.sum(dcos * cos, axis=1) * my_norm
    along = product(dcos * norm[None, :], others)
    w_ptrs, most = weight_ptr + start, tl.max(length)
    w = _load_weights(w_ptrs, length, 0, UNROLL)
    total = tl.sum(w, axis=1)
    for turn in tl.range(UNROLL, most, UNROLL):
        total += tl.sum(_load_weights(w_ptrs, length, turn, UNROLL), axis=1)
    scale = tl.load(dloss_ptr) / (WAYS * N) * my_norm / tl.where(total == 0, 1.0, total)
    dword = (along - radial[:, None] * my_pooled) * scale[:, None]
    stride = tl.full((), H, tl.int64)
    dx_ptrs = dhidden_ptr + (start * stride)[:, None] + offs_k
    _write_rows(dx_ptrs, dword, w, length, 0, keep_k, stride, UNROLL, PORTABLE)
    for turn in tl.range(UNROLL, most, UNROLL):
        w = _load_weights(w_ptrs, length, turn, UNROLL)
        _write_rows(dx_ptrs, dword, w, length, turn, keep_k, stride, UNROLL, PORTABLE)
    # rows of no word
    end = tl.load(offsets_ptr + 2 * N)
    for first in tl.range(end + tl.program_id(1) * W, T, 2 * blocks * W):
        clear = first + tl.arange(0, W)[:, None]
        zero = tl.zeros((W, BLOCK_K), dhidden_ptr.dtype.element_ty)
        tl.store(dhidden_ptr + clear * stride + offs_k, zero, mask=(clear < T) & keep_k)


def backward_tile(N: int) -> Tile:
    """Tile for so many pairs; at most 32 words."""
    return Tile(32, 128, 8) if N > 32 else Tile(16 if N <= 16 else 32, 64, 4)


def launch_few(
    dloss: Tensor,
    pooled: Tensor,
    norm: Tensor,
    cos: Tensor,
    stats: Tensor,
    weight: Tensor,
    offsets: Tensor,
    choice: Choice,
    dtype: torch.dtype,
    tile: Tile,
) -> Tensor:
    """Launch; see ``tli_engine::pooled_alignment_loss_backward``."""
    N, (T, H) = len(cos), (weight.shape[0], pooled.shape[1])
    offsets = offsets.contiguous()
    dhidden = torch.empty(T, H, dtype=dtype, device=pooled.device)
    _hidden_gradient_kernel[(triton.cdiv(H, tile.columns), 2 * triton.cdiv(N, tile.words))](
        *(dloss, pooled, norm, cos, stats),
        weight.contiguous(),
        offsets,
        offsets if choice.groups is None else choice.groups.contiguous(),
        dhidden,
        N,
        T,
        H,
        choice.inv_temperature,
        W=tile.words,
        BLOCK_K=tile.columns,
        B=max(16, triton.next_power_of_2(N)),
        EVEN=H % tile.columns == 0,
        UNROLL=UNROLL,
        PORTABLE=INTERPRET,
        **choice.constants,
        num_warps=tile.num_warps,
        num_stages=1,
        **overlap(pooled.device),
    )
    return dhidden


def pooled_alignment_loss_backward(
    dloss: Tensor,
    pooled: Tensor,
    norm: Tensor,
    cos: Tensor,
    stats: Tensor,
    weight: Tensor,
    offsets: Tensor,
    groups: Tensor | None,
    loss: str,
    temperature: float,
    dtype: torch.dtype,
    most_cosines: int,
) -> Tensor:
    """Launch; the arguments are those of ``tli_engine::pooled_alignment_loss_backward``."""
    N = len(norm) // 2
    choice = Choice(groups, loss, len(stats) // 2, 0.0, 1 / temperature)
    kept = (dloss, pooled, norm, cos, stats, weight, offsets, choice, dtype)
    if is_few(N, most_cosines):
        return launch_few(*kept, backward_tile(N))
    return pooled_alignment_loss_backward_many(*kept, most_cosines)
