"""Rotary embedding of queries and keys where one projection leaves them, in one launch.

Plain PyTorch makes a rotated half, two products and a sum of each of q and k. Here both halves of every
head are read once and written once, at the speed of a copy; heads that are not rotated are copied on
the way, so that the result is joined again. The backward is the same kernel with the sines negated.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tli_engine.kernels.nf4_tile import round_to
from tli_engine.kernels.overlap import INTERPRET, follow, overlap


class Tile(NamedTuple):
    """A launch configuration.

    Attributes:
        rows: Heads that a program takes, of one token or of several; a power of two.
        num_warps: As in Triton.
    """

    rows: int
    num_warps: int


@triton.jit(do_not_specialize=["rows", "heads"])
def _rotary_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    rows,
    H,
    heads,
    stride_xt,
    stride_xh,
    stride_cos,
    stride_sin,
    D: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    INVERSE: tl.constexpr,
    OVERLAP: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    follow(OVERLAP)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = row % H
    # int64: T * H * D passes 2**31 for 349,526 tokens of 48 heads of 128
    token = (row // H).to(tl.int64)
    offs_d = tl.arange(0, HALF)[None, :]
    keep = (row < rows)[:, None] & (offs_d < D // 2)
    x_ptr += (token * stride_xt + head * stride_xh)[:, None] + offs_d
    a = tl.load(x_ptr, mask=keep, other=0.0)
    b = tl.load(x_ptr + D // 2, mask=keep, other=0.0)
    rotated = (head < heads)[:, None]
    cos_ptr += (token * stride_cos)[:, None] + offs_d
    sin_ptr += (token * stride_sin)[:, None] + offs_d
    cos = tl.load(cos_ptr, mask=keep & rotated, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr, mask=keep & rotated, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    left, right = a.to(tl.float32), b.to(tl.float32)
    out_a = round_to(left * cos - right * sin, dtype, PORTABLE)
    out_b = round_to(right * cos + left * sin, dtype, PORTABLE)
    out_ptr += (row.to(tl.int64) * D)[:, None] + offs_d
    tl.store(out_ptr, tl.where(rotated, out_a, a), mask=keep)
    tl.store(out_ptr + D // 2, tl.where(rotated, out_b, b), mask=keep)


def half_of(D: int) -> int:
    """Columns that half a head takes in a tile, a power of two."""
    half: int = triton.next_power_of_2(D // 2)
    return half


def tile_for(rows: int, D: int, dtype: torch.dtype) -> Tile:
    """Rows and warps of a program: two 16-byte loads a thread of each half, fewer for a few rows."""
    per_thread = 16 // dtype.itemsize * (2 if rows * D > 1 << 21 else 1)
    return Tile(max(1, 128 * per_thread // half_of(D)), 4)


def with_dense_rows(x: Tensor) -> Tensor:
    """Copy if the last dimension is not contiguous; views of a projection pass as they are."""
    return x if x.stride(-1) == 1 else x.contiguous()


def launch(
    x: Tensor, cos: Tensor, sin: Tensor, heads: int, inverse: bool, tile: Tile | None = None
) -> Tensor:
    """Launch with a tile; the arguments are those of ``tli_engine::rotary``."""
    T, H, D = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = T * H
    if rows == 0:
        return out
    x, cos, sin = with_dense_rows(x), with_dense_rows(cos), with_dense_rows(sin)
    tile = tile or tile_for(rows, D, x.dtype)
    _rotary_kernel[(triton.cdiv(rows, tile.rows),)](
        x,
        cos,
        sin,
        out,
        rows,
        H,
        heads,
        x.stride(0),
        x.stride(1),
        cos.stride(0),
        sin.stride(0),
        D=D,
        HALF=half_of(D),
        ROWS=tile.rows,
        INVERSE=inverse,
        PORTABLE=INTERPRET,
        num_warps=tile.num_warps,
        **overlap(x.device),
    )
    return out


def rotary(x: Tensor, cos: Tensor, sin: Tensor, heads: int, inverse: bool) -> Tensor:
    """Launch; the arguments are those of ``tli_engine::rotary``."""
    return launch(x, cos, sin, heads, inverse)
