"""Gradient of the loss of many pooled pairs for the rows of a pack.

Chunks of cosines become their gradients, which cuBLAS multiplies by either side's vectors. A last
kernel takes each word's radial part away and writes the word's rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tli_engine.kernels.nf4_tile import round_to
from tli_engine.kernels.overlap import INTERPRET
from tli_engine.kernels.pooled_alignment_loss_many import MOST_BLOCK, cosines_of, rows_at_once
from tli_engine.kernels.pooled_loss import Choice, gradient_of, load_stats, negatives_of
from tli_engine.kernels.segment_mean_backward import clear_rows, total_of


@triton.jit(do_not_specialize=["N", "first"])
def _cosine_gradient_kernel(
    cos_ptr,
    out_ptr,
    norm_ptr,
    groups_ptr,
    stats_ptr,
    N,
    first,
    inv_temperature,
    BLOCK_N: tl.constexpr,
    MADE: tl.constexpr,
    INFONCE: tl.constexpr,
    WAYS: tl.constexpr,
    GROUPED: tl.constexpr,
):
    row = first + tl.program_id(0)
    start = tl.program_id(0).to(tl.int64) * N
    offs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = offs < N
    true = offs == row
    cos = tl.load(cos_ptr + start + offs, mask=keep, other=0.0)
    norm = tl.load(norm_ptr + row)
    norms = tl.load(norm_ptr + N + offs, mask=keep, other=1.0)
    if not MADE:
        positive = tl.load(stats_ptr + 2 * WAYS * N + row)
        cos = cosines_of(cos, norm, norms, positive, true)
    negative = negatives_of(groups_ptr, row, offs, keep, N, GROUPED)
    top, worth = load_stats(stats_ptr, 0, row, N, WAYS)
    tops, worths = load_stats(stats_ptr, 1, offs, N, WAYS)
    dcos = gradient_of(
        cos, negative, true, top, worth, tops, worths, inv_temperature, WAYS, INFONCE
    )
    # of products, not cosines, but for the part along the vector itself
    dot = dcos * (1 / norm) * (1 / norms) / (WAYS * N)
    tl.store(out_ptr + start + offs, dot, mask=keep)


@triton.jit(do_not_specialize=["T"])
def _word_rows_kernel(
    dloss_ptr,
    along_ptr,
    pooled_ptr,
    norm_ptr,
    weight_ptr,
    offsets_ptr,
    dhidden_ptr,
    T,
    H,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    word, words = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    along_ptr += word * H
    pooled_ptr += word * H
    first = tl.load(offsets_ptr + word)
    last = tl.load(offsets_ptr + word + 1)
    end = tl.load(offsets_ptr + words)
    total = total_of(weight_ptr, first, last, BLOCK_T, tl.float32)
    radial = tl.zeros((BLOCK_H,), tl.float32)
    for start in tl.range(0, H, BLOCK_H):
        offs_h = start + tl.arange(0, BLOCK_H)
        along = tl.load(along_ptr + offs_h, mask=offs_h < H, other=0.0)
        radial += along * tl.load(pooled_ptr + offs_h, mask=offs_h < H, other=0.0)
    inverse = 1 / tl.load(norm_ptr + word)
    share = tl.sum(radial) * inverse * inverse
    scale = tl.load(dloss_ptr) / total
    for start in tl.range(0, H, BLOCK_H):
        offs_h = start + tl.arange(0, BLOCK_H)
        keep = offs_h < H
        along = tl.load(along_ptr + offs_h, mask=keep, other=0.0)
        dword = (along - share * tl.load(pooled_ptr + offs_h, mask=keep, other=0.0)) * scale
        for row in tl.range(first, last):
            dx = dword * tl.load(weight_ptr + row).to(tl.float32)
            dx = round_to(dx, dhidden_ptr.dtype.element_ty, PORTABLE)
            tl.store(dhidden_ptr + row * H + offs_h, dx, mask=keep)
        clear_rows(dhidden_ptr, offs_h, keep, H, end + word, T, words)


def _along(
    pooled: Tensor,
    norm: Tensor,
    cos: Tensor,
    stats: Tensor,
    groups: Tensor,
    choice: Choice,
    most_cosines: int,
) -> Tensor:
    """Return each word's gradient but for the part along the word itself, ``[2 N, H]``."""
    N, made = len(norm) // 2, len(cos) > 0
    step = rows_at_once(N, most_cosines)
    buffer, along = pooled.new_empty(step, N), torch.empty_like(pooled)
    block = min(MOST_BLOCK, triton.next_power_of_2(N))
    for first in range(0, N, step):
        rows = slice(first, min(first + step, N))
        chunk = buffer[: rows.stop - first]
        if not made:
            torch.mm(pooled[rows], pooled[N:].T, out=chunk)
        _cosine_gradient_kernel[(len(chunk), triton.cdiv(N, block))](
            cos if made else chunk,
            chunk,
            norm,
            groups,
            stats,
            N,
            first,
            choice.inv_temperature,
            BLOCK_N=block,
            MADE=made,
            **choice.constants,
            num_warps=4,
        )
        torch.mm(chunk, pooled[N:], out=along[rows])
        if first == 0:
            torch.mm(chunk.T, pooled[rows], out=along[N:])
        else:
            along[N:].addmm_(chunk.T, pooled[rows])
    return along


def pooled_alignment_loss_backward_many(
    dloss: Tensor,
    pooled: Tensor,
    norm: Tensor,
    cos: Tensor,
    stats: Tensor,
    weight: Tensor,
    offsets: Tensor,
    choice: Choice,
    dtype: torch.dtype,
    most_cosines: int,
) -> Tensor:
    """Launch; see ``tli_engine::pooled_alignment_loss_backward``."""
    (words, H), T = pooled.shape, weight.shape[0]
    offsets = offsets.contiguous()
    groups = offsets if choice.groups is None else choice.groups.contiguous()
    along = _along(pooled, norm, cos, stats, groups, choice, most_cosines)
    dhidden = torch.empty(T, H, dtype=dtype, device=pooled.device)
    _word_rows_kernel[(words,)](
        dloss,
        along,
        pooled,
        norm,
        weight.contiguous(),
        offsets,
        dhidden,
        T,
        H,
        BLOCK_H=min(MOST_BLOCK, triton.next_power_of_2(H)),
        BLOCK_T=32,
        PORTABLE=INTERPRET,
        num_warps=4,
    )
    return dhidden
