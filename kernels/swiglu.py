"""A gated activation of a projection that yields gate and up side by side, in one launch.

Plain PyTorch writes the activation and reads it again. Here gate and up are read once and their product
written once, straight from the projection's rows. A few rows cost little more than the launch, which
overlaps the end of the kernel before.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tli_engine.kernels.dense_rows import with_dense_rows
from tli_engine.kernels.nf4_tile import round_to
from tli_engine.kernels.overlap import INTERPRET, follow, overlap


class Tile(NamedTuple):
    """A launch configuration.

    Attributes:
        rows: Rows that a program takes.
        columns: Columns of the output that it takes, a power of two.
        num_warps: As in Triton.
    """

    rows: int
    columns: int
    num_warps: int


@triton.jit
def share_and_slope(x, GELU: tl.constexpr):
    """Sigmoid that x is multiplied by, 1 less it, and the slope of what it is the sigmoid of.

    The tanh form of GELU is x times a sigmoid too, ``(1 + tanh(u)) / 2 = sigmoid(2 u)``. No difference of
    nearly equal numbers is taken, and no exponential leaves fp32's range.
    """
    if GELU:
        # 2 u, with the root of 8 / pi
        inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        inner = x
        slope = tl.full(x.shape, 1.0, tl.float32)
    small = tl.exp(-tl.abs(inner))
    large = 1.0 / (1.0 + small)
    small *= large
    return tl.where(inner < 0, small, large), tl.where(inner < 0, large, small), slope


@triton.jit
def tile_offsets(T, I, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row, column and mask of this program's tile; neighbours in a row run side by side."""
    across = tl.cdiv(I, COLUMNS)
    pid = tl.program_id(0)
    # int64: T * 2 I passes 2**31 for 36,315 rows with an I of 29568
    row = (pid // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs_i = (pid % across) * COLUMNS + tl.arange(0, COLUMNS)
    return row[:, None], offs_i[None, :], (row < T)[:, None] & (offs_i < I)[None, :]


@triton.jit(do_not_specialize=["T"])
def _swiglu_fwd_kernel(
    gate_up_ptr,
    out_ptr,
    T,
    I,
    stride_gt,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GELU: tl.constexpr,
    OVERLAP: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    follow(OVERLAP)
    row, offs_i, keep = tile_offsets(T, I, ROWS, COLUMNS)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    gate_up_ptr += row * stride_gt + offs_i
    gate = tl.load(gate_up_ptr, mask=keep, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + I, mask=keep, other=0.0).to(tl.float32)
    share, _, _ = share_and_slope(gate, GELU)
    active = round_to(gate * share, dtype, PORTABLE).to(tl.float32)
    out = round_to(active * up, dtype, PORTABLE)
    tl.store(out_ptr + row * I + offs_i, out, mask=keep)


def tile_for(T: int, I: int) -> Tile:
    """Rows, columns and warps of a program: small while that fills the GPU."""
    elements = 1024 if T * I <= 1 << 22 else 2048
    columns = min(elements, max(16, triton.next_power_of_2(I)))
    rows = min(elements // columns, triton.next_power_of_2(T))
    return Tile(rows, columns, 4)


def programs(T: int, I: int, tile: Tile) -> int:
    """Tiles of an output ``[T, I]``."""
    count: int = triton.cdiv(T, tile.rows) * triton.cdiv(I, tile.columns)
    return count


def launch_forward(gate_up: Tensor, act: str, tile: Tile) -> Tensor:
    """Launch the kernel with a tile; the arguments are those of ``tli_engine::swiglu``."""
    T, I = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(T, I, dtype=gate_up.dtype, device=gate_up.device)
    if T == 0:
        return out
    gate_up = with_dense_rows(gate_up)
    _swiglu_fwd_kernel[(programs(T, I, tile),)](
        gate_up,
        out,
        T,
        I,
        gate_up.stride(0),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        GELU=act == "gelu_tanh",
        PORTABLE=INTERPRET,
        num_warps=tile.num_warps,
        **overlap(gate_up.device),
    )
    return out


def swiglu(gate_up: Tensor, act: str) -> Tensor:
    """Launch; the arguments are those of ``tli_engine::swiglu``."""
    return launch_forward(gate_up, act, tile_for(gate_up.shape[0], gate_up.shape[1] // 2))
