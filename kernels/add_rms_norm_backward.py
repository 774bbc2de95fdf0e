"""Gradients of the norm of a sum: of the sum in one launch, of the weight in a second.

A program reads a row of the gradient, of the sum and of the gradient that arrives by the residual
path, and writes what goes on to both. If the weight learns too, a program takes many rows and keeps its
part of that gradient in registers; the parts are added in order, so that equal inputs give equal bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tli_engine.kernels.add_rms_norm import (
    Tile,
    block_d_for,
    load_rows,
    warps_for,
)
from tli_engine.kernels.dense_rows import with_dense_rows
from tli_engine.kernels.nf4_tile import round_to
from tli_engine.kernels.overlap import INTERPRET, follow, overlap

# parts of the weight's gradient: two programs for each processor of a large GPU
_PARTS = 256


@triton.jit
def _row_gradient(
    acc, dy_ptr, dh_ptr, h_ptr, rstd_ptr, weight_ptr, dx_ptr, row, offs_d, T, stride_dyt,
    stride_dht, stride_ht, D: tl.constexpr, HAS_DH: tl.constexpr, PLUS_ONE: tl.constexpr,
    PORTABLE: tl.constexpr,
):  # fmt: skip
    """Store the gradient of rows; return ``acc`` with their terms of the weight's, [R, D]."""
    keep = (row < T)[:, None] & (offs_d < D)
    dy = load_rows(dy_ptr, row, stride_dyt, offs_d, keep)
    h = load_rows(h_ptr, row, stride_ht, offs_d, keep)
    rstd = tl.load(rstd_ptr + row, mask=row < T, other=0.0)[:, None]
    if HAS_DH:
        dh = load_rows(dh_ptr, row, stride_dht, offs_d, keep)
    # for every row anew: it comes from the L1 cache, and registers are scarce
    weight = tl.load(weight_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
    if PLUS_ONE:
        weight += 1.0
    normed = h * rstd
    acc += dy * normed
    scaled = dy * weight
    mean = tl.sum(scaled * normed, axis=1) * (1.0 / D)
    dx = rstd * (scaled - normed * mean[:, None])
    if HAS_DH:
        dx += dh
    dx = round_to(dx, dx_ptr.dtype.element_ty, PORTABLE)
    tl.store(dx_ptr + row[:, None] * D + offs_d, dx, mask=keep)
    return acc


@triton.jit(do_not_specialize=["T"])
def _add_rms_norm_bwd_kernel(
    dy_ptr,
    dh_ptr,
    h_ptr,
    rstd_ptr,
    weight_ptr,
    dx_ptr,
    part_ptr,
    T,
    stride_dyt,
    stride_dht,
    stride_ht,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_DH: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    NEEDS_DWEIGHT: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    follow(OVERLAP)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    # int64: T * D passes 2**31 for 262,144 rows of 8192
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if NEEDS_DWEIGHT:
        acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
        step = tl.num_programs(0) * ROWS
        for start in tl.range(0, T, step, num_stages=STAGES):
            acc = _row_gradient(
                acc, dy_ptr, dh_ptr, h_ptr, rstd_ptr, weight_ptr, dx_ptr, start + row, offs_d, T,
                stride_dyt, stride_dht, stride_ht, D, HAS_DH, PLUS_ONE, PORTABLE,
            )  # fmt: skip
        part = tl.program_id(0) * D + tl.arange(0, BLOCK_D)
        tl.store(part_ptr + part, tl.sum(acc, axis=0), mask=tl.arange(0, BLOCK_D) < D)
    else:
        _row_gradient(
            0.0, dy_ptr, dh_ptr, h_ptr, rstd_ptr, weight_ptr, dx_ptr, row, offs_d, T,
            stride_dyt, stride_dht, stride_ht, D, HAS_DH, PLUS_ONE, PORTABLE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["parts"])
def _sum_rows_kernel(
    part_ptr,
    total_ptr,
    parts,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    follow(OVERLAP)
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for start in tl.range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        keep = (part < parts)[:, None] & (offs_d < D)[None, :]
        acc += tl.load(part_ptr + part[:, None] * D + offs_d[None, :], mask=keep, other=0.0)
    total = round_to(tl.sum(acc, axis=0), total_ptr.dtype.element_ty, PORTABLE)
    tl.store(total_ptr + offs_d, total, mask=offs_d < D)


def backward_tile(T: int, D: int) -> Tile:
    """Rows and warps of a program."""
    block_d = block_d_for(D)
    rows = 1 if T <= _PARTS else max(1, 1024 // block_d)
    return Tile(rows, warps_for(rows * block_d, 16))


def stages_for(T: int, D: int, dtype: torch.dtype) -> int:
    """Rows that a program of many has under way at once: two, where an Ada GPU's memory takes them."""
    return 2 if T > _PARTS and block_d_for(D) * dtype.itemsize <= 1 << 14 else 1


def _sum_rows(parts: Tensor, dtype: torch.dtype) -> Tensor:
    count, D = parts.shape
    total = torch.empty(D, dtype=dtype, device=parts.device)
    _sum_rows_kernel[(triton.cdiv(D, 32),)](
        parts,
        total,
        count,
        D=D,
        BLOCK_P=32,
        BLOCK_D=32,
        PORTABLE=INTERPRET,
        num_warps=4,
        **overlap(parts.device),
    )
    return total


def launch_backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    rstd: Tensor,
    weight: Tensor,
    plus_one: bool,
    needs_dweight: bool,
    tile: Tile,
) -> tuple[Tensor, Tensor]:
    """Launch with a tile; the arguments are those of ``tli_engine::add_rms_norm_backward``."""
    T, D = h.shape
    dx = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    if T == 0:
        return dx, weight.new_zeros(D if needs_dweight else 0)
    dy, h = with_dense_rows(dy), with_dense_rows(h)
    arriving = dy if dh is None else with_dense_rows(dh)
    programs = triton.cdiv(T, tile.rows)
    if needs_dweight:
        programs = min(programs, _PARTS)
    shape = (programs, D) if needs_dweight else (0,)
    parts = torch.empty(shape, dtype=torch.float32, device=h.device)
    _add_rms_norm_bwd_kernel[(programs,)](
        dy,
        arriving,
        h,
        rstd,
        weight.contiguous(),
        dx,
        parts,
        T,
        dy.stride(0),
        arriving.stride(0),
        h.stride(0),
        D=D,
        BLOCK_D=block_d_for(D),
        ROWS=tile.rows,
        HAS_DH=dh is not None,
        PLUS_ONE=plus_one,
        NEEDS_DWEIGHT=needs_dweight,
        STAGES=stages_for(T, D, h.dtype),
        PORTABLE=INTERPRET,
        num_warps=tile.num_warps,
        **overlap(h.device),
    )
    return dx, _sum_rows(parts, weight.dtype) if needs_dweight else weight.new_empty(0)


def add_rms_norm_backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    rstd: Tensor,
    weight: Tensor,
    plus_one: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """Launch; the arguments are those of ``tli_engine::add_rms_norm_backward``."""
    tile = backward_tile(*h.shape)
    return launch_backward(dy, dh, h, rstd, weight, plus_one, needs_dweight, tile)
