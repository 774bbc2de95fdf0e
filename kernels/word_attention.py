"""Causal attention within each word of a pack, rotary embedding included.

A variable-length kernel made for long texts gives each word a tile of 64 or 128 rows and masks
nearly all of it. Here a program takes STEP consecutive rows of the pack, whatever their words, and
the query heads that share a key head; WINDOW keys, of these rows and those just before, are loaded
with no wait for the words' bounds. Only a word that starts before its window needs more turns.
Rotation is done on load, so that no rotated copy is written.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tli_engine.kernels.dense_rows import with_dense_rows
from tli_engine.kernels.nf4_tile import round_to
from tli_engine.kernels.overlap import INTERPRET

LOG2_E = 1.4426950408889634


class Tile(NamedTuple):
    """A launch configuration.

    Attributes:
        step: Rows of the pack that a program is for.
        window: Rows that it meets in one turn; words of up to ``window - step + 1`` take one.
        heads: Query heads that it takes at once.
        num_warps: As in Triton.
    """

    step: int
    window: int
    heads: int
    num_warps: int


@triton.jit
def dot(a, b, acc, PORTABLE: tl.constexpr):
    """Accumulate in fp32, fp32 operands not rounded to TF32.

    The interpreter (Triton 3.6) would multiply bf16's raw bits.
    """
    if PORTABLE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load_rows(x_ptr, offs, keep, D: tl.constexpr, HALF: tl.constexpr):
    """Rows of D numbers that start at ``offs``, [R, 2 HALF]; zero where not kept."""
    offs_d = tl.arange(0, 2 * HALF)
    mask = keep[:, None] & (offs_d < D)[None, :]
    return tl.load(x_ptr + offs[:, None] + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def load_angles(
    cos_ptr, sin_ptr, row, keep, stride_cos, stride_sin, D: tl.constexpr, HALF: tl.constexpr
):
    """Cosines and sines of rows, fp32, [R, HALF] each."""
    offs_d = tl.arange(0, HALF)
    mask = keep[:, None] & (offs_d < D // 2)[None, :]
    row = row.to(tl.int64)[:, None]
    cos = tl.load(cos_ptr + row * stride_cos + offs_d[None, :], mask=mask, other=0.0)
    sin = tl.load(sin_ptr + row * stride_sin + offs_d[None, :], mask=mask, other=0.0)
    return cos.to(tl.float32), sin.to(tl.float32)


@triton.jit
def load_rotated(
    x_ptr, offs, cos, sin, keep, D: tl.constexpr, HALF: tl.constexpr, PORTABLE: tl.constexpr
):
    """Rows of D numbers, rotated in fp32 and rounded once: both halves, [R, HALF] each."""
    offs_d = tl.arange(0, HALF)
    mask = keep[:, None] & (offs_d < D // 2)[None, :]
    x_ptr += offs[:, None] + offs_d[None, :]
    a = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + D // 2, mask=mask, other=0.0).to(tl.float32)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    return (
        round_to(a * cos - b * sin, dtype, PORTABLE),
        round_to(b * cos + a * sin, dtype, PORTABLE),
    )


@triton.jit
def load_keys(
    k_ptr, v_ptr, cos_ptr, sin_ptr, row, keep, stride_k, stride_v, stride_cos, stride_sin,
    D: tl.constexpr, HALF: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """Rotated halves of keys, and values."""
    cos, sin = load_angles(cos_ptr, sin_ptr, row, keep, stride_cos, stride_sin, D, HALF)
    row = row.to(tl.int64)
    ka, kb = load_rotated(k_ptr, row * stride_k, cos, sin, keep, D, HALF, PORTABLE)
    return ka, kb, load_rows(v_ptr, row * stride_v, keep, D, HALF)


@triton.jit
def turns_for(rows, WINDOW: tl.constexpr):
    """Turns of a loop over windows: one, and more for ``rows`` that lie outside the first."""
    turns = 1 + tl.maximum((rows + WINDOW - 1) // WINDOW, 0)
    # known to run once, the loop starts with no wait for the bounds that ``rows`` was loaded from
    tl.assume(turns > 0)
    return turns


@triton.jit
def scores_of(xa, xb, ya, yb, visible, scale, PORTABLE: tl.constexpr):
    """Scaled products of rotated rows, [X, Y], to be raised from base 2; -inf where not visible."""
    scores = tl.zeros((xa.shape[0], ya.shape[0]), tl.float32)
    scores = dot(xa, tl.trans(ya), scores, PORTABLE)
    scores = dot(xb, tl.trans(yb), scores, PORTABLE)
    return tl.where(visible, scores * scale, float("-inf"))


@triton.jit(do_not_specialize=["T"])
def _word_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    bound_ptr,
    out_ptr,
    lse_ptr,
    T,
    heads,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_cos,
    stride_sin,
    scale,
    D: tl.constexpr,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    STEP: tl.constexpr,
    WINDOW: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    row_0 = tl.program_id(0) * STEP
    first = tl.load(bound_ptr + row_0)
    kv_head = tl.program_id(1).to(tl.int64)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    offs_r = tl.arange(0, STEP * HEADS)
    row = row_0 + offs_r // HEADS
    group = tl.program_id(2) * HEADS + offs_r % HEADS
    keep_r = (row < T) & (group < GROUP)
    head = kv_head * GROUP + group
    start = tl.load(bound_ptr + row, mask=row < T, other=0)
    cos, sin = load_angles(cos_ptr, sin_ptr, row, keep_r, stride_cos, stride_sin, D, HALF)
    offs_q = row.to(tl.int64) * stride_qt + head * stride_qh
    qa, qb = load_rotated(q_ptr, offs_q, cos, sin, keep_r, D, HALF, PORTABLE)
    k_ptr += kv_head * stride_kh
    v_ptr += kv_head * stride_vh
    near = row_0 + STEP - WINDOW
    top = tl.full((STEP * HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((STEP * HEADS,), tl.float32)
    acc = tl.zeros((STEP * HEADS, 2 * HALF), tl.float32)
    turns = turns_for(near - first, WINDOW)
    for turn in tl.range(0, turns, num_stages=1):
        offs_n = near - turn * WINDOW + tl.arange(0, WINDOW)
        ka, kb, v = load_keys(
            k_ptr, v_ptr, cos_ptr, sin_ptr, offs_n, (offs_n >= 0) & (offs_n < T), stride_kt,
            stride_vt, stride_cos, stride_sin, D, HALF, PORTABLE,
        )  # fmt: skip
        visible = (offs_n[None, :] >= start[:, None]) & (offs_n[None, :] <= row[:, None])
        scores = scores_of(qa, qb, ka, kb, visible, scale, PORTABLE)
        # every row sees itself in the first turn: the maximum is finite from there on
        higher = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - higher)
        p = tl.exp2(scores - higher[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = dot(round_to(p, dtype, PORTABLE), v, acc * shrink[:, None], PORTABLE)
        top = higher
    offs_o = row.to(tl.int64) * heads + head
    # base 2 inside, base e outside
    tl.store(lse_ptr + offs_o, (top + tl.log2(total)) * 0.6931471805599453, mask=keep_r)
    offs_d = tl.arange(0, 2 * HALF)
    out = round_to(acc / total[:, None], dtype, PORTABLE)
    keep = keep_r[:, None] & (offs_d < D)[None, :]
    tl.store(out_ptr + (offs_o * D)[:, None] + offs_d[None, :], out, mask=keep)


def half_of(D: int) -> int:
    """Columns that half a head takes in a tile: a power of two, 16 for the tensor cores."""
    half: int = triton.next_power_of_2(D // 2)
    return max(16, half)


def choose_heads(D: int, group: int, dtype: torch.dtype, budget: int) -> int:
    """Query heads a program takes at once, so that a row of them fits ``budget`` bytes; at most 4."""
    row = 2 * half_of(D) * dtype.itemsize
    most: int = triton.next_power_of_2(group)
    return min(max(1, budget // row), most, 4)


def forward_tile(D: int, group: int, dtype: torch.dtype) -> Tile:
    """Tile of the forward kernel: the largest that spills few registers, if any."""
    return Tile(step=16, window=32, heads=choose_heads(D, group, dtype, 1024), num_warps=4)


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    bounds: Tensor,
    scale: float,
    tile: Tile,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel with a tile; the arguments are those of ``tli_engine::word_attention``."""
    q, k, v, cos, sin = (with_dense_rows(x) for x in (q, k, v, cos, sin))
    T, heads, D = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(T, heads, dtype=torch.float32, device=q.device)
    group = heads // k.shape[1]
    grid = (triton.cdiv(T, tile.step), k.shape[1], triton.cdiv(group, tile.heads))
    _word_attention_fwd_kernel[grid](
        q,
        k,
        v,
        cos,
        sin,
        bounds,
        out,
        lse,
        T,
        heads,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        cos.stride(0),
        sin.stride(0),
        scale * LOG2_E,
        D=D,
        HALF=half_of(D),
        GROUP=group,
        HEADS=tile.heads,
        STEP=tile.step,
        WINDOW=tile.window,
        PORTABLE=INTERPRET,
        num_warps=tile.num_warps,
    )
    return out, lse


def word_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, bounds: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Launch; the arguments are those of ``tli_engine::word_attention``."""
    if q.shape[0] == 0:
        return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    tile = forward_tile(q.shape[2], q.shape[1] // k.shape[1], q.dtype)
    return launch_forward(q, k, v, cos, sin, bounds.contiguous(), scale, tile)
