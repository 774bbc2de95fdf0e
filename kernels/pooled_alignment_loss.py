"""Loss of pooled words' cosines, with what its gradient needs.

Up to 64 pairs are one launch. A program pools some columns of a tile's words on load and multiplies
them. The last of a tile to arrive adds the parts, in order, and takes what the tile has to say of
each row and column; the last of these ends the loss. More pairs are cuBLAS' and a few kernels'.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tli_engine.kernels.cosine_similarity import norm_of, squares
from tli_engine.kernels.dense_rows import with_dense_rows
from tli_engine.kernels.fp32_product import product_of_rows
from tli_engine.kernels.overlap import follow, overlap
from tli_engine.kernels.pooled_alignment_loss_many import pooled_alignment_loss_many
from tli_engine.kernels.pooled_loss import (
    Choice,
    gathered,
    locate,
    losses_of,
    merged,
    negatives_of,
    semihard_of,
)
from tli_engine.kernels.semaphores import semaphores
from tli_engine.kernels.split_sum import add_parts, arrives_last

# pairs whose loss one launch takes
MOST_PAIRS = 64
# rows of each word whose loads are under way at once
UNROLL = 4
# counters are a line of the L2 cache apart
_APART = 32
_MOST_PARTS = 32


class Tile(NamedTuple):
    """A launch configuration.

    Attributes:
        words: Sources, and targets, that a program pools.
        columns: Columns that it pools at once.
        num_warps: As in Triton.
    """

    words: int
    columns: int
    num_warps: int


@triton.jit
def _add_rows(acc, total, x_ptrs, w_ptrs, length, turn, keep_k, stride, UNROLL: tl.constexpr):
    """Add some rows of each word, times their weights, and the weights."""
    for i in tl.static_range(UNROLL):
        w = tl.load(w_ptrs + (turn + i), mask=turn + i < length, other=0.0).to(tl.float32)
        # a row left out is not read: it may be infinite
        keep = (w != 0)[:, None] & keep_k
        x = tl.load(x_ptrs + (turn + i) * stride, mask=keep, other=0.0).to(tl.float32)
        acc = tl.fma(x, tl.broadcast_to(w[:, None], x.shape), acc)
        total += w
    return acc, total


@triton.jit
def _pool(
    x_ptrs, wx_ptrs, length_x, y_ptrs, wy_ptrs, length_y, keep_k, stride, UNROLL: tl.constexpr
):
    """Means of the words of two sides, some columns, [W, K] each."""
    x = tl.zeros(x_ptrs.shape, tl.float32)
    y = tl.zeros(x_ptrs.shape, tl.float32)
    total_x = tl.zeros(length_x.shape, tl.float32)
    total_y = tl.zeros(length_x.shape, tl.float32)
    # the first rows are under way before it is known how many the longest word has
    x, total_x = _add_rows(x, total_x, x_ptrs, wx_ptrs, length_x, 0, keep_k, stride, UNROLL)
    y, total_y = _add_rows(y, total_y, y_ptrs, wy_ptrs, length_y, 0, keep_k, stride, UNROLL)
    for turn in tl.range(UNROLL, tl.max(tl.maximum(length_x, length_y)), UNROLL):
        x, total_x = _add_rows(x, total_x, x_ptrs, wx_ptrs, length_x, turn, keep_k, stride, UNROLL)
        y, total_y = _add_rows(y, total_y, y_ptrs, wy_ptrs, length_y, turn, keep_k, stride, UNROLL)
    x *= (1 / tl.where(total_x == 0, 1.0, total_x))[:, None]
    y *= (1 / tl.where(total_y == 0, 1.0, total_y))[:, None]
    return x, y


@triton.jit
def _tops(
    cos, chosen, positive, margin, inv_temperature, AXIS: tl.constexpr, INFONCE: tl.constexpr,
    SEMIHARD: tl.constexpr,
):  # fmt: skip
    """Along one axis the largest logit and the sum of powers; or the hardest, and its ties."""
    if SEMIHARD:
        chosen = semihard_of(cos, chosen, tl.expand_dims(positive, AXIS), margin)
    value = tl.where(chosen, cos * inv_temperature if INFONCE else cos, float("-inf"))
    return gathered(value, chosen.to(tl.float32), AXIS, INFONCE)


@triton.jit
def _of_tiles(
    tile_ptr, way: tl.constexpr, word, W: tl.constexpr, TILES: tl.constexpr, INFONCE: tl.constexpr
):  # fmt: skip
    """The same of whole rows (way 0) or columns (1), from those of tiles."""
    NOTES: tl.constexpr = 5 * W + 2
    tile_ptr += (word // W) * (NOTES if way else TILES * NOTES) + 2 * way * W + word % W
    top = tl.load(tile_ptr, cache_modifier=".cg")
    total = tl.load(tile_ptr + W, cache_modifier=".cg")
    for i in tl.static_range(1, TILES):
        ptrs = tile_ptr + i * (TILES * NOTES if way else NOTES)
        other = tl.load(ptrs, cache_modifier=".cg")
        more = tl.load(ptrs + W, cache_modifier=".cg")
        top, total = merged(top, total, other, more, INFONCE)
    return top, total


@triton.jit
def _of_all(
    cos_ptr, groups_ptr, way: tl.constexpr, positive, N, margin, inv_temperature, B: tl.constexpr,
    GROUPED: tl.constexpr,
):  # fmt: skip
    """The same of semi-hard negatives, which cannot be told before all true cosines are known."""
    row, column = tl.arange(0, B)[:, None], tl.arange(0, B)[None, :]
    keep = (row < N) & (column < N)
    cos = tl.load(cos_ptr + row * N + column, mask=keep, other=0.0, cache_modifier=".cg")
    negative = negatives_of(groups_ptr, row, column, keep, N, GROUPED)
    return _tops(cos, negative, positive, margin, inv_temperature, 1 - way, False, True)


@triton.jit
def _end_way(
    stats_ptr, way, top, total, positive, N, margin, inv_temperature, INFONCE: tl.constexpr
):
    """Keep what the gradient needs of one way; return the sum of its losses."""
    word = tl.arange(0, top.shape[0])
    loss, worth = losses_of(top, total, positive, margin, inv_temperature, INFONCE)
    tl.store(stats_ptr + 2 * way * N + word, top, mask=word < N)
    tl.store(stats_ptr + (2 * way + 1) * N + word, worth, mask=word < N)
    return tl.sum(tl.where(word < N, loss, 0.0))


@triton.jit
def _end(
    loss_ptr, true_ptr, wrong_ptr, stats_ptr, loss, positive, wrong, count, N, WAYS: tl.constexpr
):
    word = tl.arange(0, positive.shape[0])
    tl.store(stats_ptr + 2 * WAYS * N + word, positive, mask=word < N)
    tl.store(loss_ptr, loss / (WAYS * N))
    tl.store(true_ptr, tl.sum(positive) / N)
    tl.store(wrong_ptr, wrong / count)


@triton.jit
def _sum_of_notes(note_ptr, stride, count: tl.constexpr):
    total = tl.load(note_ptr, cache_modifier=".cg")
    for i in tl.static_range(1, count):
        total += tl.load(note_ptr + i * stride, cache_modifier=".cg")
    return total


@triton.jit
def _take_tile(
    dot, xx, yy, tile, keep_x, keep_y, groups_ptr, loss_ptr, true_ptr, wrong_ptr, norm_ptr,
    cos_ptr, stats_ptr, tile_ptr, lock_ptr, N, margin, inv_temperature,
    W: tl.constexpr, TILES: tl.constexpr, INFONCE: tl.constexpr, SEMIHARD: tl.constexpr,
    WAYS: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """Cosines and norms of a tile, and its part in the loss; the last tile's program ends the loss."""
    lane = tl.arange(0, W)
    word_x, word_y = tile // TILES * W + lane, tile % TILES * W + lane
    row, column = word_x[:, None], word_y[None, :]
    keep = (row < N) & (column < N)
    norm_x, norm_y = norm_of(xx), norm_of(yy)
    cos = dot * (1 / norm_x)[:, None] * (1 / norm_y)[None, :]
    tl.store(cos_ptr + row * N + column, cos, mask=keep)
    tl.store(norm_ptr + word_x, norm_x, mask=keep_x)
    tl.store(norm_ptr + N + word_y, norm_y, mask=keep_y)
    true = keep & (row == column)
    negative = negatives_of(groups_ptr, row, column, keep, N, GROUPED)
    positive = tl.sum(tl.where(true, cos, 0.0), axis=1)
    wrong = tl.sum(tl.where(negative, cos, 0.0))
    count = tl.sum(negative.to(tl.float32))
    chosen = negative | true if INFONCE else negative
    loss = 0.0
    if TILES == 1:
        for way in tl.static_range(WAYS):
            top, total = _tops(
                cos, chosen, positive, margin, inv_temperature, 1 - way, INFONCE, SEMIHARD
            )
            loss += _end_way(
                stats_ptr, way, top, total, positive, N, margin, inv_temperature, INFONCE
            )
        _end(loss_ptr, true_ptr, wrong_ptr, stats_ptr, loss, positive, wrong, count, N, WAYS)
    else:
        NOTES: tl.constexpr = 5 * W + 2
        note_ptr = tile_ptr + tile * NOTES
        tl.store(note_ptr + 4 * W + lane, positive)
        tl.store(note_ptr + 5 * W, wrong)
        tl.store(note_ptr + 5 * W + 1, count)
        if not SEMIHARD:
            for way in tl.static_range(WAYS):
                top, total = _tops(
                    cos, chosen, positive, margin, inv_temperature, 1 - way, INFONCE, False
                )
                tl.store(note_ptr + 2 * way * W + lane, top)
                tl.store(note_ptr + (2 * way + 1) * W + lane, total)
        is_last = arrives_last(lock_ptr, TILES * TILES)
        if is_last:
            wrong = _sum_of_notes(tile_ptr + 5 * W, NOTES, TILES * TILES)
            count = _sum_of_notes(tile_ptr + 5 * W + 1, NOTES, TILES * TILES)
            word = tl.arange(0, TILES * W)
            # of the tiles on the diagonal
            ptrs = tile_ptr + (word // W) * ((TILES + 1) * NOTES) + 4 * W + word % W
            all_true = tl.load(ptrs, cache_modifier=".cg")
            for way in tl.static_range(WAYS):
                if SEMIHARD:
                    highest, sums = _of_all(
                        cos_ptr, groups_ptr, way, all_true, N, margin, inv_temperature,
                        TILES * W, GROUPED,
                    )  # fmt: skip
                else:
                    highest, sums = _of_tiles(tile_ptr, way, word, W, TILES, INFONCE)
                loss += _end_way(
                    stats_ptr, way, highest, sums, all_true, N, margin, inv_temperature, INFONCE
                )
            _end(loss_ptr, true_ptr, wrong_ptr, stats_ptr, loss, all_true, wrong, count, N, WAYS)


@triton.jit(do_not_specialize=["N"])
def _pooled_loss_kernel(
    hidden_ptr,
    weight_ptr,
    offsets_ptr,
    groups_ptr,
    loss_ptr,
    true_ptr,
    wrong_ptr,
    pooled_ptr,
    norm_ptr,
    cos_ptr,
    stats_ptr,
    part_ptr,
    tile_ptr,
    lock_ptr,
    N,
    H,
    stride_ht,
    margin,
    inv_temperature,
    W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    TILES: tl.constexpr,
    EVEN: tl.constexpr,
    UNROLL: tl.constexpr,
    APART: tl.constexpr,
    INFONCE: tl.constexpr,
    SEMIHARD: tl.constexpr,
    WAYS: tl.constexpr,
    GROUPED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    follow(OVERLAP)
    tile, part = tl.program_id(0), tl.program_id(1)
    tile_x, tile_y = tile // TILES, tile % TILES
    lane = tl.arange(0, W)
    word_x, word_y = tile_x * W + lane, tile_y * W + lane
    start_x, length_x = locate(offsets_ptr, word_x, word_x < N)
    start_y, length_y = locate(offsets_ptr, N + word_y, word_y < N)
    # each word's means are kept by one of the programs that make them
    keep_x = (word_x < N) & (tile_x == tile_y)
    keep_y = (word_y < N) & (tile_y == (tile_x + 1) % TILES)
    steps = tl.cdiv(H, BLOCK_K)
    dot = tl.zeros((W, W), tl.float32)
    xx = tl.zeros((W,), tl.float32)
    yy = tl.zeros((W,), tl.float32)
    for step in tl.range(part * steps // SPLIT, (part + 1) * steps // SPLIT):
        offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        keep_k = offs_k >= 0 if EVEN else offs_k < H
        stride = tl.full((), stride_ht, tl.int64)
        x, y = _pool(
            hidden_ptr + (start_x * stride)[:, None] + offs_k, weight_ptr + start_x, length_x,
            hidden_ptr + (start_y * stride)[:, None] + offs_k, weight_ptr + start_y, length_y,
            keep_k, stride, UNROLL,
        )  # fmt: skip
        xx += squares(x)
        yy += squares(y)
        dot += product_of_rows(x, y)
        tl.store(pooled_ptr + word_x[:, None] * H + offs_k, x, mask=keep_x[:, None] & keep_k)
        tl.store(pooled_ptr + (N + word_y)[:, None] * H + offs_k, y, mask=keep_y[:, None] & keep_k)
    # a tile's parts: products, and squares of both sides
    PART: tl.constexpr = W * W + 2 * W
    offs = lane[:, None] * W + lane[None, :]
    part_ptr += tile * (SPLIT * PART)
    if SPLIT > 1:
        tl.store(part_ptr + part * PART + offs, dot)
        tl.store(part_ptr + part * PART + W * W + lane, xx)
        tl.store(part_ptr + part * PART + W * W + W + lane, yy)
    is_last = arrives_last(lock_ptr + tile * APART, SPLIT)
    if is_last:
        if SPLIT > 1:
            dot = add_parts(part_ptr, offs, offs >= 0, PART, SPLIT)
            split = tl.arange(0, SPLIT)[:, None] * PART + (W * W + lane)[None, :]
            xx = tl.sum(tl.load(part_ptr + split, cache_modifier=".cg"), axis=0)
            yy = tl.sum(tl.load(part_ptr + split + W, cache_modifier=".cg"), axis=0)
        _take_tile(
            dot, xx, yy, tile, keep_x, keep_y, groups_ptr, loss_ptr, true_ptr, wrong_ptr, norm_ptr,
            cos_ptr, stats_ptr, tile_ptr, lock_ptr + TILES * TILES * APART, N, margin,
            inv_temperature, W, TILES, INFONCE, SEMIHARD, WAYS, GROUPED,
        )  # fmt: skip


def forward_tile(N: int, dtype: torch.dtype, loss: str) -> Tile:
    """Tile for so many pairs, with which nothing is spilled."""
    if N <= 16:
        return Tile(16, 128, 8)
    if dtype.itemsize == 4:
        return Tile(32, 64, 16)
    # semi-hard negatives of all pairs are chosen by one program
    return Tile(32, 128, 16 if loss == "triplet-semihard" and N > 32 else 8)


def is_few(N: int, most_cosines: int) -> bool:
    """Whether one launch takes so many pairs."""
    return N <= MOST_PAIRS and most_cosines >= N * N


def launch_few(
    hidden: Tensor, weight: Tensor, offsets: Tensor, choice: Choice, tile: Tile
) -> tuple[Tensor, ...]:
    """Launch; see ``tli_engine::pooled_alignment_loss``."""
    words, H = offsets.shape[0] - 1, hidden.shape[1]
    N = words // 2
    hidden, offsets = with_dense_rows(hidden), offsets.contiguous()
    loss, true, wrong = (hidden.new_empty((), dtype=torch.float32) for _ in range(3))
    pooled, norm = loss.new_empty(words, H), loss.new_empty(words)
    cos, stats = loss.new_empty(N, N), loss.new_empty(2 * choice.ways + 1, N)
    tiles = triton.next_power_of_2(triton.cdiv(N, tile.words))
    split = min(_MOST_PARTS, triton.next_power_of_2(triton.cdiv(H, tile.columns) + 1) // 2)
    scratch = (
        loss.new_empty(tiles * tiles, split, tile.words * (tile.words + 2)),
        loss.new_empty(tiles * tiles, 5 * tile.words + 2),
        semaphores(hidden.device, (tiles * tiles + 1) * _APART),
    )
    _pooled_loss_kernel[(tiles * tiles, split)](
        hidden,
        weight.contiguous(),
        offsets,
        offsets if choice.groups is None else choice.groups.contiguous(),
        *(loss, true, wrong, pooled, norm, cos, stats),
        *scratch,
        *(N, H, hidden.stride(0), choice.margin, choice.inv_temperature),
        W=tile.words,
        BLOCK_K=tile.columns,
        SPLIT=split,
        TILES=tiles,
        EVEN=H % tile.columns == 0,
        UNROLL=UNROLL,
        APART=_APART,
        SEMIHARD=choice.loss == "triplet-semihard",
        **choice.constants,
        num_warps=tile.num_warps,
        num_stages=1,
        **overlap(hidden.device),
    )
    return loss, true, wrong, pooled, norm, cos, stats


def pooled_alignment_loss(
    hidden: Tensor,
    weight: Tensor,
    offsets: Tensor,
    groups: Tensor | None,
    loss: str,
    margin: float,
    temperature: float,
    two_way: bool,
    most_cosines: int,
) -> tuple[Tensor, ...]:
    """Launch; the arguments are those of ``tli_engine::pooled_alignment_loss``, checked."""
    choice = Choice(groups, loss, 2 if two_way else 1, margin, 1 / temperature)
    N = (offsets.shape[0] - 1) // 2
    if is_few(N, most_cosines):
        return launch_few(hidden, weight, offsets, choice, forward_tile(N, hidden.dtype, loss))
    return pooled_alignment_loss_many(hidden, weight, offsets, choice, most_cosines)
