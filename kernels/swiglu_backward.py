"""Gradient of a gated activation: both halves in one launch, the activation computed anew.

Nothing but the projection's rows has to be kept for it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tli_engine.kernels.dense_rows import with_dense_rows
from tli_engine.kernels.nf4_tile import round_to
from tli_engine.kernels.overlap import INTERPRET, follow, overlap
from tli_engine.kernels.swiglu import (
    Tile,
    programs,
    share_and_slope,
    tile_for,
    tile_offsets,
)


@triton.jit(do_not_specialize=["T"])
def _swiglu_bwd_kernel(
    dout_ptr,
    gate_up_ptr,
    dgate_up_ptr,
    T,
    I,
    stride_dt,
    stride_gt,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GELU: tl.constexpr,
    OVERLAP: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    follow(OVERLAP)
    row, offs_i, keep = tile_offsets(T, I, ROWS, COLUMNS)
    dtype: tl.constexpr = dgate_up_ptr.dtype.element_ty
    gate_up_ptr += row * stride_gt + offs_i
    gate = tl.load(gate_up_ptr, mask=keep, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + I, mask=keep, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + row * stride_dt + offs_i, mask=keep, other=0.0).to(tl.float32)
    share, rest, slope = share_and_slope(gate, GELU)
    active = gate * share
    dgate = dout * up * (share + active * rest * slope)
    dgate_up_ptr += row * (2 * I) + offs_i
    tl.store(dgate_up_ptr, round_to(dgate, dtype, PORTABLE), mask=keep)
    tl.store(dgate_up_ptr + I, round_to(dout * active, dtype, PORTABLE), mask=keep)


def launch_backward(dout: Tensor, gate_up: Tensor, act: str, tile: Tile) -> Tensor:
    """Launch with a tile; the arguments are those of ``tli_engine::swiglu_backward``."""
    T, I = dout.shape
    dgate_up = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    if T == 0:
        return dgate_up
    dout, gate_up = with_dense_rows(dout), with_dense_rows(gate_up)
    _swiglu_bwd_kernel[(programs(T, I, tile),)](
        dout,
        gate_up,
        dgate_up,
        T,
        I,
        dout.stride(0),
        gate_up.stride(0),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        GELU=act == "gelu_tanh",
        PORTABLE=INTERPRET,
        num_warps=tile.num_warps,
        **overlap(gate_up.device),
    )
    return dgate_up


def swiglu_backward(dout: Tensor, gate_up: Tensor, act: str) -> Tensor:
    """Launch; the arguments are those of ``tli_engine::swiglu_backward``."""
    return launch_backward(dout, gate_up, act, tile_for(*dout.shape))
