"""Cross-entropy of rows of logits, and its gradient in their place, in one launch.

Plain PyTorch writes log-probabilities, reads them, writes a gradient of each step. Here a program takes
a row, and every thread keeps the maximum and the sum of its own share, so that nothing is exchanged
before the row's end. The second pass reads the row backwards: what was read last is still in the L2
cache. A Hopper GPU's holds a row of 128,256 in bf16 for each multiprocessor but not two, so that a
program has warps enough to keep a multiprocessor to itself.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tli_engine.kernels.nf4_tile import round_to
from tli_engine.kernels.overlap import INTERPRET, follow, overlap

# fp32's lowest: less minus infinity it is no NaN, as minus infinity would be
LOWEST = tl.constexpr(-3.4028234663852886e38)


class Tile(NamedTuple):
    """A launch configuration.

    Attributes:
        shares: Maxima and sums that a row is split into; each takes 16 bytes a turn; a power of two.
        num_warps: As in Triton.
    """

    shares: int
    num_warps: int


@triton.jit
def _statistics(logits_ptr, offs, V, SHARES: tl.constexpr, STEP: tl.constexpr):
    """Maximum of a row, and sum of the exponentials less it."""
    top = tl.full((SHARES,), LOWEST, tl.float32)
    total = tl.zeros((SHARES,), tl.float32)
    for start in tl.range(0, V, STEP):
        keep = start + offs < V
        # to be read again
        x = tl.load(
            logits_ptr + start + offs, mask=keep, other=float("-inf"), eviction_policy="evict_last"
        ).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher[:, None]), 1)
        top = higher
    highest = tl.max(top, 0)
    return highest, tl.sum(total * tl.exp(top - highest), 0)


@triton.jit
def _cross_entropy_rows_kernel(
    logits_ptr,
    target_ptr,
    loss_ptr,
    V,
    stride_l,
    SHARES: tl.constexpr,
    VECTOR: tl.constexpr,
    OVERLAP: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    follow(OVERLAP)
    # int64: L * V passes 2**31 for 16,744 rows of 128,256
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_l
    target = tl.load(target_ptr + row)
    known = (target >= 0) & (target < V)
    column = tl.where(known, target, 0).to(tl.int32)
    # before it is overwritten
    at_target = tl.load(logits_ptr + column).to(tl.float32)
    offs = tl.arange(0, SHARES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    STEP: tl.constexpr = SHARES * VECTOR
    highest, total = _statistics(logits_ptr, offs, V, SHARES, STEP)
    loss = tl.log(total) - (at_target - highest)
    tl.store(loss_ptr + row, tl.where(known, loss, float("nan")))
    scale = tl.where(known, 1.0 / total, float("nan"))
    turns = tl.cdiv(V, STEP)
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    for turn in tl.range(turns):
        offs_v = (turns - 1 - turn) * STEP + offs
        keep = offs_v < V
        x = tl.load(
            logits_ptr + offs_v, mask=keep, other=float("-inf"), eviction_policy="evict_first"
        ).to(tl.float32)
        p = tl.exp(x - highest) * scale
        grad = round_to(tl.where(offs_v == column, p - 1.0, p), dtype, PORTABLE)
        tl.store(logits_ptr + offs_v, grad, mask=keep, eviction_policy="evict_first")


def vector_of(dtype: torch.dtype) -> int:
    """Numbers in 16 bytes."""
    return 16 // dtype.itemsize


def tile_for(V: int, dtype: torch.dtype) -> Tile:
    """Shares and warps of a program: up to 1024 threads, each with four loads under way at once."""
    shares = min(4096, triton.next_power_of_2(triton.cdiv(V, vector_of(dtype))))
    return Tile(shares, max(1, min(32, shares // 128)))


def launch(logits: Tensor, targets: Tensor, tile: Tile) -> Tensor:
    """Launch with a tile; the arguments are those of ``tli_engine::cross_entropy_rows_``."""
    L, V = logits.shape
    losses = torch.empty(L, dtype=torch.float32, device=logits.device)
    if L == 0:
        return losses
    _cross_entropy_rows_kernel[(L,)](
        logits,
        targets.contiguous(),
        losses,
        V,
        logits.stride(0),
        SHARES=tile.shares,
        VECTOR=vector_of(logits.dtype),
        PORTABLE=INTERPRET,
        num_warps=tile.num_warps,
        **overlap(logits.device),
    )
    return losses


def cross_entropy_rows(logits: Tensor, targets: Tensor) -> Tensor:
    """Launch; the arguments are those of ``tli_engine::cross_entropy_rows_``."""
    return launch(logits, targets, tile_for(logits.shape[1], logits.dtype))
