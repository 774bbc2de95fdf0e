"""A residual added, then the root-mean-square norm of the sum, in one launch.

Plain PyTorch writes the sum, its fp32 copy, the square and the quotient one by one. Here a program holds
whole rows in registers: they are read once, and the sum and its norm written once. A few rows cost
little more than the launch, which overlaps the end of the kernel before.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tli_engine.kernels.dense_rows import with_dense_rows
from tli_engine.kernels.nf4_tile import round_to
from tli_engine.kernels.overlap import INTERPRET, follow, overlap

# up to so many rows each has a program of its own, and many warps to be done soon
_FEW_ROWS = 1024


class Tile(NamedTuple):
    """A launch configuration.

    Attributes:
        rows: Rows that a program takes.
        num_warps: As in Triton.
    """

    rows: int
    num_warps: int


@triton.jit
def load_rows(x_ptr, row, stride, offs_d, keep):
    """Elements of rows, fp32, [R, D]; zero where not kept."""
    x = tl.load(x_ptr + row[:, None] * stride + offs_d, mask=keep, other=0.0)
    return x.to(tl.float32)


@triton.jit(do_not_specialize=["T"])
def _add_rms_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    h_ptr,
    rstd_ptr,
    T,
    stride_xt,
    stride_rt,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    OVERLAP: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    follow(OVERLAP)
    # int64: T * D passes 2**31 for 262,144 rows of 8192
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    keep = (row < T)[:, None] & (offs_d < D)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    h = load_rows(x_ptr, row, stride_xt, offs_d, keep)
    if HAS_RESIDUAL:
        h += load_rows(residual_ptr, row, stride_rt, offs_d, keep)
    weight = tl.load(weight_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
    offs = row[:, None] * D + offs_d
    if HAS_RESIDUAL:
        total = round_to(h, dtype, PORTABLE)
        tl.store(h_ptr + offs, total, mask=keep)
        # the norm is that of what the next block reads
        h = total.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(h * h, axis=1) * (1.0 / D) + eps)
    normed = h * rstd[:, None]
    if PLUS_ONE:
        y = normed * (1.0 + weight)
    else:
        y = round_to(normed, dtype, PORTABLE).to(tl.float32) * weight
    tl.store(y_ptr + offs, round_to(y, dtype, PORTABLE), mask=keep)
    tl.store(rstd_ptr + row, rstd, mask=row < T)


def block_d_for(D: int) -> int:
    """Columns of a tile: all of a row."""
    columns: int = triton.next_power_of_2(D)
    return max(columns, 16)


def warps_for(elements: int, each: int) -> int:
    """Warps for so many elements, ``each`` to a thread; 1 to 16."""
    return min(max(elements // (32 * each), 1), 16)


def forward_tile(T: int, D: int) -> Tile:
    """Rows and warps of a program."""
    block_d = block_d_for(D)
    if T <= _FEW_ROWS:
        return Tile(1, warps_for(block_d, 16))
    rows = max(1, 2048 // block_d)
    return Tile(rows, warps_for(rows * block_d, 32))


def launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, plus_one: bool, tile: Tile
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel with a tile; the arguments are those of ``tli_engine::add_rms_norm``."""
    x = with_dense_rows(x)
    T, D = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = torch.empty(0 if residual is None else x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(T, dtype=torch.float32, device=x.device)
    if T == 0:
        return y, h, rstd
    added = x if residual is None else with_dense_rows(residual)
    _add_rms_norm_fwd_kernel[(triton.cdiv(T, tile.rows),)](
        x,
        added,
        weight.contiguous(),
        y,
        h,
        rstd,
        T,
        x.stride(0),
        added.stride(0),
        eps,
        D=D,
        BLOCK_D=block_d_for(D),
        ROWS=tile.rows,
        HAS_RESIDUAL=residual is not None,
        PLUS_ONE=plus_one,
        PORTABLE=INTERPRET,
        num_warps=tile.num_warps,
        **overlap(x.device),
    )
    return y, h, rstd


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, plus_one: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch; the arguments are those of ``tli_engine::add_rms_norm``."""
    return launch_forward(x, residual, weight, eps, plus_one, forward_tile(*x.shape))
