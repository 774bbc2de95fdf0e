"""Loss of many pooled pairs and its gradient, in chunks of rows of the cosines.

cuBLAS multiplies, in fp32. Cosines that fit into one chunk are made once and kept for the gradient;
others are made again for it, by the same products and so bit for bit the same.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tli_engine.kernels.cosine_similarity import norm_of
from tli_engine.kernels.dense_rows import with_dense_rows
from tli_engine.kernels.pooled_loss import (
    Choice,
    gathered,
    losses_of,
    merged,
    negatives_of,
    semihard_of,
)
from tli_engine.kernels.segment_mean import mean_of

# columns whose losses a program takes, and rows that it reads at once
COLUMNS, ROWS = 16, 64
# numbers of a row that a program reads at once
MOST_BLOCK = 1024


@triton.jit
def _pool_pairs_kernel(
    hidden_ptr,
    weight_ptr,
    offsets_ptr,
    pooled_ptr,
    norm_ptr,
    positive_ptr,
    H,
    stride_ht,
    BLOCK_H: tl.constexpr,
    UNROLL: tl.constexpr,
):
    pair, N = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    xx = tl.zeros((BLOCK_H,), tl.float32)
    yy = tl.zeros((BLOCK_H,), tl.float32)
    xy = tl.zeros((BLOCK_H,), tl.float32)
    for start in tl.range(0, H, BLOCK_H):
        offs_h = start + tl.arange(0, BLOCK_H)
        keep = offs_h < H
        x = mean_of(
            hidden_ptr, weight_ptr, offsets_ptr, pair, offs_h, keep, stride_ht, UNROLL, tl.float32
        )
        y = mean_of(
            hidden_ptr, weight_ptr, offsets_ptr, N + pair, offs_h, keep, stride_ht, UNROLL,
            tl.float32,
        )  # fmt: skip
        tl.store(pooled_ptr + pair * H + offs_h, x, mask=keep)
        tl.store(pooled_ptr + (N + pair) * H + offs_h, y, mask=keep)
        xx += x * x
        yy += y * y
        xy += x * y
    norm_x, norm_y = norm_of(tl.sum(xx)), norm_of(tl.sum(yy))
    tl.store(norm_ptr + pair, norm_x)
    tl.store(norm_ptr + N + pair, norm_y)
    tl.store(positive_ptr + pair, tl.sum(xy) * (1 / norm_x) * (1 / norm_y))


@triton.jit
def cosines_of(dot, norm_row, norm_column, positive, true):
    """Cosines of products; the true ones are those that the losses are told."""
    return tl.where(true, positive, dot * (1 / norm_row) * (1 / norm_column))


@triton.jit(do_not_specialize=["N", "first"])
def _row_tops_kernel(
    cos_ptr,
    norm_ptr,
    positive_ptr,
    groups_ptr,
    stats_ptr,
    wrong_ptr,
    count_ptr,
    N,
    first,
    margin,
    inv_temperature,
    BLOCK_N: tl.constexpr,
    INFONCE: tl.constexpr,
    SEMIHARD: tl.constexpr,
    GROUPED: tl.constexpr,
):
    row = first + tl.program_id(0)
    cos_ptr += tl.program_id(0).to(tl.int64) * N
    positive, norm = tl.load(positive_ptr + row), tl.load(norm_ptr + row)
    wrong = tl.zeros((BLOCK_N,), tl.float32)
    count = tl.zeros((BLOCK_N,), tl.float32)
    top = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        offs = start + tl.arange(0, BLOCK_N)
        keep = offs < N
        dot = tl.load(cos_ptr + offs, mask=keep, other=0.0)
        norms = tl.load(norm_ptr + N + offs, mask=keep, other=1.0)
        cos = cosines_of(dot, norm, norms, positive, offs == row)
        tl.store(cos_ptr + offs, cos, mask=keep)
        negative = negatives_of(groups_ptr, row, offs, keep, N, GROUPED)
        wrong += tl.where(negative, cos, 0.0)
        count += tl.where(negative, 1.0, 0.0)
        chosen = semihard_of(cos, negative, positive, margin) if SEMIHARD else negative
        if INFONCE:
            chosen |= offs == row
        value = tl.where(chosen, cos * inv_temperature if INFONCE else cos, float("-inf"))
        top, total = merged(top, total, value, chosen.to(tl.float32), INFONCE)
    highest, sums = gathered(top, total, 0, INFONCE)
    tl.store(stats_ptr + row, highest)
    tl.store(stats_ptr + N + row, sums)
    tl.store(wrong_ptr + row, tl.sum(wrong))
    tl.store(count_ptr + row, tl.sum(count))


@triton.jit(do_not_specialize=["N", "first", "last"])
def _column_tops_kernel(
    cos_ptr,
    positive_ptr,
    groups_ptr,
    stats_ptr,
    N,
    first,
    last,
    margin,
    inv_temperature,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INFONCE: tl.constexpr,
    SEMIHARD: tl.constexpr,
    GROUPED: tl.constexpr,
):
    lane = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    column = lane[None, :]
    positive = tl.load(positive_ptr + column, mask=column < N, other=0.0)
    top = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        keep = (row < last) & (column < N)
        offs = (row - first).to(tl.int64) * N + column
        cos = tl.load(cos_ptr + offs, mask=keep, other=0.0)
        negative = negatives_of(groups_ptr, row, column, keep, N, GROUPED)
        chosen = semihard_of(cos, negative, positive, margin) if SEMIHARD else negative
        if INFONCE:
            chosen |= keep & (row == column)
        value = tl.where(chosen, cos * inv_temperature if INFONCE else cos, float("-inf"))
        top, total = merged(top, total, value, chosen.to(tl.float32), INFONCE)
    highest, sums = gathered(top, total, 0, INFONCE)
    # with those of the chunks before
    before = (lane < N) & (first > 0)
    other = tl.load(stats_ptr + 2 * N + lane, mask=before, other=float("-inf"))
    more = tl.load(stats_ptr + 3 * N + lane, mask=before, other=0.0)
    highest, sums = merged(highest, sums, other, more, INFONCE)
    tl.store(stats_ptr + 2 * N + lane, highest, mask=lane < N)
    tl.store(stats_ptr + 3 * N + lane, sums, mask=lane < N)


@triton.jit(do_not_specialize=["N"])
def _end_kernel(
    positive_ptr,
    wrongs_ptr,
    count_ptr,
    stats_ptr,
    loss_ptr,
    true_ptr,
    wrong_ptr,
    N,
    margin,
    inv_temperature,
    BLOCK_N: tl.constexpr,
    INFONCE: tl.constexpr,
    WAYS: tl.constexpr,
):
    losses = tl.zeros((BLOCK_N,), tl.float32)
    true = tl.zeros((BLOCK_N,), tl.float32)
    wrong = tl.zeros((BLOCK_N,), tl.float32)
    count = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        offs = start + tl.arange(0, BLOCK_N)
        keep = offs < N
        positive = tl.load(positive_ptr + offs, mask=keep, other=0.0)
        true += positive
        wrong += tl.load(wrongs_ptr + offs, mask=keep, other=0.0)
        count += tl.load(count_ptr + offs, mask=keep, other=0.0)
        for way in tl.static_range(WAYS):
            total_ptrs = stats_ptr + (2 * way + 1) * N + offs
            top = tl.load(stats_ptr + 2 * way * N + offs, mask=keep, other=0.0)
            total = tl.load(total_ptrs, mask=keep, other=1.0)
            loss, worth = losses_of(top, total, positive, margin, inv_temperature, INFONCE)
            losses += tl.where(keep, loss, 0.0)
            tl.store(total_ptrs, worth, mask=keep)
    tl.store(loss_ptr, tl.sum(losses) / (WAYS * N))
    tl.store(true_ptr, tl.sum(true) / N)
    tl.store(wrong_ptr, tl.sum(wrong) / tl.sum(count))


def rows_at_once(N: int, most_cosines: int) -> int:
    """Rows of a chunk of cosines: all of them if they are to be kept."""
    return max(1, min(N, most_cosines // N))


def _pool_pairs(
    hidden: Tensor, weight: Tensor, offsets: Tensor, positive: Tensor
) -> tuple[Tensor, Tensor]:
    """Return pooled vectors and their norms; write the true cosines."""
    words, H = offsets.shape[0] - 1, hidden.shape[1]
    hidden = with_dense_rows(hidden)
    pooled = torch.empty(words, H, dtype=torch.float32, device=hidden.device)
    norm = pooled.new_empty(words)
    _pool_pairs_kernel[(words // 2,)](
        hidden,
        weight.contiguous(),
        offsets,
        pooled,
        norm,
        positive,
        H,
        hidden.stride(0),
        BLOCK_H=min(MOST_BLOCK, triton.next_power_of_2(H)),
        UNROLL=4,
        num_warps=4,
    )
    return pooled, norm


def pooled_alignment_loss_many(
    hidden: Tensor, weight: Tensor, offsets: Tensor, choice: Choice, most_cosines: int
) -> tuple[Tensor, ...]:
    """Launch; see ``tli_engine::pooled_alignment_loss``."""
    N, offsets = offsets.shape[0] // 2, offsets.contiguous()
    groups = offsets if choice.groups is None else choice.groups.contiguous()
    stats = torch.empty(2 * choice.ways + 1, N, dtype=torch.float32, device=hidden.device)
    positive, (wrongs, count) = stats[-1], stats.new_empty(2, N)
    pooled, norm = _pool_pairs(hidden, weight, offsets, positive)
    step = rows_at_once(N, most_cosines)
    cos = pooled.new_empty(step, N)
    numbers = (choice.margin, choice.inv_temperature)
    constants = choice.constants
    ways = constants.pop("WAYS")
    semihard = choice.loss == "triplet-semihard"
    block = min(MOST_BLOCK, triton.next_power_of_2(N))
    for first in range(0, N, step):
        last = min(first + step, N)
        chunk = torch.mm(pooled[first:last], pooled[N:].T, out=cos[: last - first])
        _row_tops_kernel[(len(chunk),)](
            *(chunk, norm, positive, groups, stats, wrongs, count, N, first, *numbers),
            BLOCK_N=block,
            SEMIHARD=semihard,
            **constants,
        )
        if ways == 2:
            _column_tops_kernel[(triton.cdiv(N, COLUMNS),)](
                *(chunk, positive, groups, stats, N, first, last, *numbers),
                ROWS=ROWS,
                COLUMNS=COLUMNS,
                SEMIHARD=semihard,
                **constants,
            )
    loss, true, wrong = (pooled.new_empty(()) for _ in range(3))
    del constants["GROUPED"]
    _end_kernel[(1,)](
        *(positive, wrongs, count, stats, loss, true, wrong, N, *numbers),
        BLOCK_N=block,
        WAYS=ways,
        **constants,
    )
    kept = cos if most_cosines >= N * N else cos.new_empty(0, N)
    return loss, true, wrong, pooled, norm, kept, stats
