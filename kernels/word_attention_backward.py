"""Gradients of attention within each word of a pack: dq, dk and dv in one launch, no atomics.

A program takes STEP consecutive rows of one key head: either as queries, for their dq, or as keys,
for their dk and dv, summed over the query heads in a fixed order. Probabilities are computed again
from the log-sum-exp. The gradients land side by side in one tensor, as the gradient of the
projection wants them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tli_engine.kernels.dense_rows import with_dense_rows
from tli_engine.kernels.nf4_tile import round_to
from tli_engine.kernels.overlap import INTERPRET
from tli_engine.kernels.word_attention import (
    LOG2_E,
    Tile,
    choose_heads,
    dot,
    half_of,
    load_angles,
    load_keys,
    load_rotated,
    load_rows,
    scores_of,
    turns_for,
)


@triton.jit
def _load_queries(
    q_ptr, dout_ptr, out_ptr, lse_ptr, cos_ptr, sin_ptr, row, head, keep, heads,
    stride_qt, stride_qh, stride_dt, stride_dh, stride_cos, stride_sin,
    D: tl.constexpr, HALF: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """Rotated halves of queries, dout, and per row ``dout . out`` and the log-sum-exp to base 2."""
    wide = row.to(tl.int64)
    dout = load_rows(dout_ptr, wide * stride_dt + head * stride_dh, keep, D, HALF)
    out = load_rows(out_ptr, (wide * heads + head) * D, keep, D, HALF)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    lse = tl.load(lse_ptr + wide * heads + head, mask=keep, other=0.0) * 1.4426950408889634
    cos, sin = load_angles(cos_ptr, sin_ptr, row, keep, stride_cos, stride_sin, D, HALF)
    offs_q = wide * stride_qt + head * stride_qh
    qa, qb = load_rotated(q_ptr, offs_q, cos, sin, keep, D, HALF, PORTABLE)
    return qa, qb, dout, delta, lse


@triton.jit
def _store_rotated_back(
    x_ptr, offs, a, b, cos, sin, keep, D: tl.constexpr, HALF: tl.constexpr, PORTABLE: tl.constexpr
):
    """Store a gradient's halves after the rotation's transpose."""
    offs_d = tl.arange(0, HALF)
    mask = keep[:, None] & (offs_d < D // 2)[None, :]
    x_ptr += offs[:, None] + offs_d[None, :]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    tl.store(x_ptr, round_to(a * cos + b * sin, dtype, PORTABLE), mask=mask)
    tl.store(x_ptr + D // 2, round_to(b * cos - a * sin, dtype, PORTABLE), mask=mask)


@triton.jit
def _dq_of_tile(
    dout_ptr, q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, bound_ptr, out_ptr, lse_ptr, dqkv_ptr,
    row_0, kv_head, part, width, T, heads, stride_dt, stride_dh, stride_qt, stride_qh, stride_kt,
    stride_vt, stride_cos, stride_sin, scale, score_scale,
    D: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr,
    STEP: tl.constexpr, WINDOW: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    first = tl.load(bound_ptr + row_0)
    offs_r = tl.arange(0, STEP * HEADS)
    row = row_0 + offs_r // HEADS
    group = part * HEADS + offs_r % HEADS
    head = kv_head * GROUP + group
    keep = (row < T) & (group < GROUP)
    start = tl.load(bound_ptr + row, mask=keep, other=T)
    qa, qb, dout, delta, lse = _load_queries(
        q_ptr, dout_ptr, out_ptr, lse_ptr, cos_ptr, sin_ptr, row, head, keep, heads,
        stride_qt, stride_qh, stride_dt, stride_dh, stride_cos, stride_sin, D, HALF, PORTABLE,
    )  # fmt: skip
    near = row_0 + STEP - WINDOW
    dqa = tl.zeros((STEP * HEADS, HALF), tl.float32)
    dqb = tl.zeros((STEP * HEADS, HALF), tl.float32)
    for turn in tl.range(0, turns_for(near - first, WINDOW), num_stages=1):
        offs_n = near - turn * WINDOW + tl.arange(0, WINDOW)
        ka, kb, v = load_keys(
            k_ptr, v_ptr, cos_ptr, sin_ptr, offs_n, (offs_n >= 0) & (offs_n < T), stride_kt,
            stride_vt, stride_cos, stride_sin, D, HALF, PORTABLE,
        )  # fmt: skip
        visible = (offs_n[None, :] >= start[:, None]) & (offs_n[None, :] <= row[:, None])
        p = tl.exp2(scores_of(qa, qb, ka, kb, visible, score_scale, PORTABLE) - lse[:, None])
        dp = dot(dout, tl.trans(v), tl.zeros((STEP * HEADS, WINDOW), tl.float32), PORTABLE)
        ds = round_to(p * (dp - delta[:, None]), qa.dtype, PORTABLE)
        dqa = dot(ds, ka, dqa, PORTABLE)
        dqb = dot(ds, kb, dqb, PORTABLE)
    cos, sin = load_angles(cos_ptr, sin_ptr, row, keep, stride_cos, stride_sin, D, HALF)
    offs = row.to(tl.int64) * width + head * D
    _store_rotated_back(dqkv_ptr, offs, dqa * scale, dqb * scale, cos, sin, keep, D, HALF, PORTABLE)


@triton.jit
def _dkv_of_tile(
    dout_ptr, q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, bound_ptr, out_ptr, lse_ptr, dqkv_ptr,
    row_0, kv_head, kv_heads, width, T, heads, stride_dt, stride_dh, stride_qt, stride_qh,
    stride_kt, stride_vt, stride_cos, stride_sin, scale, score_scale,
    D: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr,
    STEP: tl.constexpr, WINDOW: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    last = tl.load(bound_ptr + T + tl.minimum(row_0 + STEP, T) - 1)
    offs_n = row_0 + tl.arange(0, STEP)
    keep_n = offs_n < T
    ka, kb, v = load_keys(
        k_ptr, v_ptr, cos_ptr, sin_ptr, offs_n, keep_n, stride_kt, stride_vt, stride_cos,
        stride_sin, D, HALF, PORTABLE,
    )  # fmt: skip
    dka = tl.zeros((STEP, HALF), tl.float32)
    dkb = tl.zeros((STEP, HALF), tl.float32)
    dv = tl.zeros((STEP, 2 * HALF), tl.float32)
    offs_r = tl.arange(0, WINDOW * HEADS)
    for part in tl.range(0, (GROUP + HEADS - 1) // HEADS, num_stages=1):
        group = part * HEADS + offs_r % HEADS
        head = kv_head * GROUP + group
        for turn in tl.range(0, turns_for(last - row_0 - WINDOW, WINDOW), num_stages=1):
            row = row_0 + turn * WINDOW + offs_r // HEADS
            keep = (row < T) & (group < GROUP)
            start = tl.load(bound_ptr + row, mask=keep, other=T)
            qa, qb, dout, delta, lse = _load_queries(
                q_ptr, dout_ptr, out_ptr, lse_ptr, cos_ptr, sin_ptr, row, head, keep, heads,
                stride_qt, stride_qh, stride_dt, stride_dh, stride_cos, stride_sin, D, HALF,
                PORTABLE,
            )  # fmt: skip
            # keys down, queries across
            visible = (offs_n[:, None] >= start[None, :]) & (offs_n[:, None] <= row[None, :])
            p = tl.exp2(scores_of(ka, kb, qa, qb, visible, score_scale, PORTABLE) - lse[None, :])
            dp = dot(v, tl.trans(dout), tl.zeros((STEP, WINDOW * HEADS), tl.float32), PORTABLE)
            ds = round_to(p * (dp - delta[None, :]), qa.dtype, PORTABLE)
            dka = dot(ds, qa, dka, PORTABLE)
            dkb = dot(ds, qb, dkb, PORTABLE)
            dv = dot(round_to(p, qa.dtype, PORTABLE), dout, dv, PORTABLE)
    cos, sin = load_angles(cos_ptr, sin_ptr, offs_n, keep_n, stride_cos, stride_sin, D, HALF)
    offs = offs_n.to(tl.int64) * width + (heads + kv_head) * D
    _store_rotated_back(
        dqkv_ptr, offs, dka * scale, dkb * scale, cos, sin, keep_n, D, HALF, PORTABLE
    )
    offs_d = tl.arange(0, 2 * HALF)
    offs = (offs + kv_heads * D)[:, None] + offs_d[None, :]
    mask = keep_n[:, None] & (offs_d < D)[None, :]
    tl.store(dqkv_ptr + offs, round_to(dv, v.dtype, PORTABLE), mask=mask)


@triton.jit(do_not_specialize=["T"])
def _word_attention_bwd_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, bound_ptr, out_ptr, lse_ptr, dqkv_ptr,
    T, heads, stride_dt, stride_dh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt,
    stride_vh, stride_cos, stride_sin, scale, score_scale,
    D: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr,
    STEP: tl.constexpr, WINDOW: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    row_0 = tl.program_id(0) * STEP
    kv_head = tl.program_id(1).to(tl.int64)
    kv_heads = tl.num_programs(1)
    width = (heads + 2 * kv_heads) * D
    k_ptr += kv_head * stride_kh
    v_ptr += kv_head * stride_vh
    # the longer work comes first
    if tl.program_id(2) == 0:
        _dkv_of_tile(
            dout_ptr, q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, bound_ptr, out_ptr, lse_ptr, dqkv_ptr,
            row_0, kv_head, kv_heads, width, T, heads, stride_dt, stride_dh, stride_qt, stride_qh,
            stride_kt, stride_vt, stride_cos, stride_sin, scale, score_scale,
            D, HALF, GROUP, HEADS, STEP, WINDOW, PORTABLE,
        )  # fmt: skip
    else:
        _dq_of_tile(
            dout_ptr, q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, bound_ptr, out_ptr, lse_ptr, dqkv_ptr,
            row_0, kv_head, tl.program_id(2) - 1, width, T, heads, stride_dt, stride_dh, stride_qt,
            stride_qh, stride_kt, stride_vt, stride_cos, stride_sin, scale, score_scale,
            D, HALF, GROUP, HEADS, STEP, WINDOW, PORTABLE,
        )  # fmt: skip


def backward_tile(
    D: int, group: int, dtype: torch.dtype, capability: tuple[int, int] = (9, 0)
) -> Tile:
    """Tile of the backward kernel: the largest that spills few registers, if any."""
    # four heads of 128 spill 20 bytes on Hopper and are faster (H200: 22.8 against 28.9 us at 512
    # tokens), but 600 bytes on Ampere
    hopper = capability == (9, 0) and dtype.itemsize == 2
    heads = choose_heads(D, group, dtype, 1024 if hopper else 512)
    row = 2 * half_of(D) * dtype.itemsize
    # fp32 heads of 256: a window of 32 takes more shared memory than sm_89 has
    window = 16 if row > 512 else 32
    return Tile(step=16, window=window, heads=heads, num_warps=8 if heads * row >= 512 else 4)


def launch_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    bounds: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    tile: Tile,
) -> Tensor:
    """Launch the kernel with a tile; see ``tli_engine::word_attention_backward``."""
    dout, q, k, v, cos, sin = (with_dense_rows(x) for x in (dout, q, k, v, cos, sin))
    (T, heads, D), kv_heads = q.shape, k.shape[1]
    dqkv = torch.empty(T, heads + 2 * kv_heads, D, dtype=q.dtype, device=q.device)
    group = heads // kv_heads
    grid = (triton.cdiv(T, tile.step), kv_heads, 1 + triton.cdiv(group, tile.heads))
    _word_attention_bwd_kernel[grid](
        dout,
        q,
        k,
        v,
        cos,
        sin,
        bounds,
        out,
        lse,
        dqkv,
        T,
        heads,
        *dout.stride()[:2],
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        cos.stride(0),
        sin.stride(0),
        scale,
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
    return dqkv


def word_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    bounds: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> Tensor:
    """Launch; the arguments are those of ``tli_engine::word_attention_backward``."""
    if q.shape[0] == 0:
        return q.new_empty(0, q.shape[1] + 2 * k.shape[1], q.shape[2])
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (9, 0)
    tile = backward_tile(q.shape[2], q.shape[1] // k.shape[1], q.dtype, capability)
    return launch_backward(dout, q, k, v, cos, sin, bounds.contiguous(), out, lse, scale, tile)
