"""Attention from one new token a row to all that is kept of the row, and keeping its key and value.

Decoding reads every key and value once, so that bandwidth is the floor, and a row's key heads are too
few programs to reach it. Here the slots that a row sees, and no others, are divided among SPLITS
programs a key head; each takes all query heads of it, and a second launch adds the parts up. The
first of them begins with the new key, from the registers that it is kept from: no other launch writes
the cache, and none waits for it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tli_engine.kernels.dense_rows import with_dense_rows
from tli_engine.kernels.nf4_tile import round_to
from tli_engine.kernels.overlap import INTERPRET, follow, overlap
from tli_engine.kernels.word_attention import LOG2_E, dot

# the smallest tile of queries that a product takes
_QUERIES = 16
# bytes of a tile of keys; as many of values, three times over, fit 99 KiB
_TILE_BYTES = 16384
# programs that keep an H100's memory busy: four for each of 132 multiprocessors
_PROGRAMS, _MOST_SPLITS = 528, 16


class Tile(NamedTuple):
    """A launch configuration.

    Attributes:
        splits: Programs that share the slots of one key head; a power of two.
        block: Slots that a program takes in a turn; a power of two.
        num_warps: As in Triton.
        num_stages: As in Triton.
    """

    splits: int
    block: int
    num_warps: int
    num_stages: int


@triton.jit(do_not_specialize=["heads", "window"])
def _cached_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    keys_ptr,
    values_ptr,
    begin_ptr,
    slot_ptr,
    out_ptr,
    part_ptr,
    top_ptr,
    sum_ptr,
    heads,
    stride_qr,
    stride_qh,
    stride_kr,
    stride_kh,
    stride_vr,
    stride_vh,
    stride_keys_r,
    stride_keys_s,
    stride_keys_h,
    stride_values_r,
    stride_values_s,
    stride_values_h,
    scale,
    window,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    follow(OVERLAP)
    # int64: rows * slots * heads * D passes 2**31
    row = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    split = tl.program_id(1)
    slot = tl.load(slot_ptr)
    first = tl.maximum(tl.load(begin_ptr + row), slot - window + 1)
    offs_d = tl.arange(0, COLUMNS)
    offs_g = tl.arange(0, QUERIES)
    in_d = offs_d < D
    in_q = (offs_g < GROUP)[:, None] & in_d[None, :]
    dtype: tl.constexpr = out_ptr.dtype.element_ty

    q_ptr += row * stride_qr + head * GROUP * stride_qh
    q = tl.load(q_ptr + offs_g[:, None] * stride_qh + offs_d[None, :], mask=in_q, other=0.0)
    new_k = tl.load(k_ptr + row * stride_kr + head * stride_kh + offs_d, mask=in_d, other=0.0)
    new_v = tl.load(v_ptr + row * stride_vr + head * stride_vh + offs_d, mask=in_d, other=0.0)
    keys_ptr += row * stride_keys_r + head * stride_keys_h
    values_ptr += row * stride_values_r + head * stride_values_h
    # the first part has the new token, and keeps it
    is_first = split == 0
    tl.store(keys_ptr + slot * stride_keys_s + offs_d, new_k, mask=in_d & is_first)
    tl.store(values_ptr + slot * stride_values_s + offs_d, new_v, mask=in_d & is_first)
    score = tl.sum(q.to(tl.float32) * new_k.to(tl.float32)[None, :], axis=1) * scale
    top = tl.where(is_first, score, float("-inf"))
    total = tl.where(is_first, 1.0, 0.0) + tl.zeros([QUERIES], dtype=tl.float32)
    acc = tl.zeros([QUERIES, COLUMNS], dtype=tl.float32)
    acc += tl.where(is_first, new_v.to(tl.float32), 0.0)[None, :]

    share = tl.cdiv(tl.cdiv(slot - first, SPLITS), BLOCK) * BLOCK
    start = first + split * share
    end = tl.minimum(start + share, slot)
    for s in range(start, end, BLOCK):
        offs_s = s + tl.arange(0, BLOCK)
        seen = offs_s < end
        tile = seen[:, None] & in_d[None, :]
        keys = tl.load(
            keys_ptr + offs_s[:, None] * stride_keys_s + offs_d[None, :], mask=tile, other=0.0
        )
        scores = tl.zeros([QUERIES, BLOCK], dtype=tl.float32)
        scores = dot(q, tl.trans(keys), scores, PORTABLE) * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        values = tl.load(
            values_ptr + offs_s[:, None] * stride_values_s + offs_d[None, :], mask=tile, other=0.0
        )
        acc = dot(round_to(weights, dtype, PORTABLE), values, acc * shrink[:, None], PORTABLE)
        top = higher

    # query heads, counted over all rows
    query = row * heads * GROUP + head * GROUP + offs_g
    if SPLITS == 1:
        out = round_to(acc / total[:, None], dtype, PORTABLE)
        tl.store(out_ptr + query[:, None] * D + offs_d[None, :], out, mask=in_q)
    else:
        part = query * SPLITS + split
        tl.store(top_ptr + part, top, mask=offs_g < GROUP)
        tl.store(sum_ptr + part, total, mask=offs_g < GROUP)
        # what no slot went into is not read
        filled = in_q & (is_first | (start < end))
        tl.store(part_ptr + part[:, None] * D + offs_d[None, :], acc, mask=filled)


@triton.jit
def _add_parts_kernel(
    part_ptr,
    top_ptr,
    sum_ptr,
    out_ptr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    follow(OVERLAP)
    query = tl.program_id(0).to(tl.int64)
    part = query * SPLITS + tl.arange(0, SPLITS)
    offs_d = tl.arange(0, COLUMNS)
    top = tl.load(top_ptr + part)
    weight = tl.exp2(top - tl.max(top, axis=0))
    filled = (top > float("-inf"))[:, None] & (offs_d < D)[None, :]
    acc = tl.load(part_ptr + part[:, None] * D + offs_d[None, :], mask=filled, other=0.0)
    total = tl.sum(weight * tl.load(sum_ptr + part), axis=0)
    out = tl.sum(acc * weight[:, None], axis=0) / total
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr + query * D + offs_d, round_to(out, dtype, PORTABLE), mask=offs_d < D)


def columns_of(D: int) -> int:
    """Columns that a head takes in a tile, a power of two that a product takes."""
    columns: int = max(16, triton.next_power_of_2(D))
    return columns


def tile_for(rows: int, heads: int, slots: int, D: int, dtype: torch.dtype) -> Tile:
    """Slots of a turn by their bytes; parts until there are enough programs, or no slots for more."""
    block = min(64, max(16, _TILE_BYTES // (columns_of(D) * dtype.itemsize)))
    splits = 1
    while splits < _MOST_SPLITS and 2 * splits * rows * heads <= _PROGRAMS:
        if 2 * splits * block > slots:
            break
        splits *= 2
    # a head of 256 columns would spill in fewer
    return Tile(splits, block, 8 if columns_of(D) > 128 else 4, 3)


def launch(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, begin: Tensor, slot: Tensor,
    scale: float, window: int | None, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """Launch with a tile; the arguments are those of ``tli_engine::cached_attention_``."""
    rows, query_heads, D = q.shape
    slots, heads = keys.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    q, k, v = with_dense_rows(q), with_dense_rows(k), with_dense_rows(v)
    tile = tile or tile_for(rows, heads, slots, D, q.dtype)
    parts = rows * query_heads * tile.splits if tile.splits > 1 else 0
    floats = torch.empty(parts * (D + 2), dtype=torch.float32, device=q.device)
    part, top, total = floats.split([parts * D, parts, parts])
    sizes = {"D": D, "COLUMNS": columns_of(D), "SPLITS": tile.splits, "PORTABLE": INTERPRET}
    group = query_heads // heads
    _cached_attention_kernel[(rows * heads, tile.splits)](
        q,
        k,
        v,
        keys,
        values,
        begin,
        slot,
        out,
        part,
        top,
        total,
        heads,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *keys.stride()[:3],
        *values.stride()[:3],
        scale * LOG2_E,
        slots if window is None else window,
        GROUP=group,
        QUERIES=max(_QUERIES, triton.next_power_of_2(group)),
        BLOCK=tile.block,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **sizes,
        **overlap(q.device),
    )
    if tile.splits > 1:
        _add_parts_kernel[(rows * query_heads,)](
            part, top, total, out, num_warps=1, **sizes, **overlap(q.device)
        )
    return out


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, begin: Tensor, slot: Tensor,
    scale: float, window: int | None,
) -> Tensor:  # fmt: skip
    """Launch; the arguments are those of ``tli_engine::cached_attention_``."""
    return launch(q, k, v, keys, values, begin, slot, scale, window)
