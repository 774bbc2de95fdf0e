"""Cosine similarity of all pairs of rows.

Few rows are one launch: a program reads some columns of a tile's rows once, for the products and
both norms, and the last one of a tile to arrive adds the parts, in order, and divides. Many rows are
scaled to length one, then multiplied by cuBLAS.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tli_engine.kernels.dense_rows import with_dense_rows
from tli_engine.kernels.fp32_product import product_of_rows
from tli_engine.kernels.segment_mean import acc_of, divide, triton_acc_of
from tli_engine.kernels.split_sum import LOCKS, arrivals, split_for, sum_of_parts

# tiles of 32 x 32 pairs of the largest problem that is one launch: as many as a captured launch has
# counters for
_MOST_TILES = 16
# columns a program reads at once
BLOCK_K = 128


@triton.jit
def squares(x):
    """Sum of squares of each row, [R]."""
    return tl.sum(x * x, axis=1)


@triton.jit
def norm_of(squares):
    """Norm, never less than the op's 1e-12."""
    return tl.maximum(tl.sqrt(squares), 1e-12)


@triton.jit
def finish_tile(
    dot, xx, yy, cos_ptr, x_norm_ptr, y_norm_ptr, part_ptr, square_ptr, lock_ptr,
    tile_n, tile_m, tiles_m, part, N, M, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Add up the parts of a tile's products and squares; the last program writes cosines and norms."""
    lane = tl.arange(0, BLOCK)
    offs_n, offs_m = tile_n * BLOCK + lane, tile_m * BLOCK + lane
    keep = (offs_n < N)[:, None] & (offs_m < M)[None, :]
    tile = tile_n * tiles_m + tile_m
    square_ptr += tile * (2 * SPLIT * BLOCK)
    # written before the program counts itself in, and so seen by the last
    tl.store(square_ptr + part * BLOCK + lane, xx)
    tl.store(square_ptr + (SPLIT + part) * BLOCK + lane, yy)
    offs = offs_n[:, None] * M + offs_m[None, :]
    locks = lock_ptr + tile * LOCKS
    total, is_last = sum_of_parts(dot, part_ptr, locks, part, offs, keep, N * M, SPLIT)
    if is_last:
        if SPLIT > 1:
            xx = tl.zeros((BLOCK,), tl.float32)
            yy = tl.zeros((BLOCK,), tl.float32)
            for i in tl.static_range(SPLIT):
                xx += tl.load(square_ptr + i * BLOCK + lane, cache_modifier=".cg")
                yy += tl.load(square_ptr + (SPLIT + i) * BLOCK + lane, cache_modifier=".cg")
        x_norm, y_norm = norm_of(xx), norm_of(yy)
        tl.store(cos_ptr + offs, total / x_norm[:, None] / y_norm[None, :], mask=keep)
        tl.store(x_norm_ptr + offs_n, x_norm, mask=(offs_n < N) & (tile_m == 0))
        tl.store(y_norm_ptr + offs_m, y_norm, mask=(offs_m < M) & (tile_n == 0))


@triton.jit
def _load_tile(x_ptr, offs_r, offs_k, rows, D, stride):
    mask = (offs_r < rows)[:, None] & (offs_k < D)[None, :]
    x_ptrs = x_ptr + offs_r.to(tl.int64)[:, None] * stride + offs_k[None, :]
    return tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["N", "M"])
def _cosine_few_kernel(
    x_ptr,
    y_ptr,
    cos_ptr,
    x_norm_ptr,
    y_norm_ptr,
    part_ptr,
    square_ptr,
    lock_ptr,
    N,
    M,
    D,
    stride_xn,
    stride_ym,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    tiles_m = tl.cdiv(M, BLOCK)
    tile_n, tile_m = tl.program_id(0) // tiles_m, tl.program_id(0) % tiles_m
    part = tl.program_id(1)
    steps = tl.cdiv(D, BLOCK_K)
    offs_n = tile_n * BLOCK + tl.arange(0, BLOCK)
    offs_m = tile_m * BLOCK + tl.arange(0, BLOCK)
    dot = tl.zeros((BLOCK, BLOCK), tl.float32)
    xx = tl.zeros((BLOCK,), tl.float32)
    yy = tl.zeros((BLOCK,), tl.float32)
    for step in tl.range(part * steps // SPLIT, (part + 1) * steps // SPLIT):
        offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        x = _load_tile(x_ptr, offs_n, offs_k, N, D, stride_xn)
        y = _load_tile(y_ptr, offs_m, offs_k, M, D, stride_ym)
        xx += squares(x)
        yy += squares(y)
        dot += product_of_rows(x, y)
    finish_tile(
        dot, xx, yy, cos_ptr, x_norm_ptr, y_norm_ptr, part_ptr, square_ptr, lock_ptr,
        tile_n, tile_m, tiles_m, part, N, M, BLOCK, SPLIT,
    )  # fmt: skip


@triton.jit
def _unit_rows_kernel(
    x_ptr, unit_ptr, norm_ptr, D, stride_xn, BLOCK_D: tl.constexpr, ACC: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xn
    unit_ptr += row * D
    square = tl.zeros((BLOCK_D,), ACC)
    for start in tl.range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + offs_d, mask=offs_d < D, other=0.0).to(ACC)
        square += x * x
    norm = norm_of(tl.sum(square))
    tl.store(norm_ptr + row, norm)
    norm += tl.zeros((BLOCK_D,), ACC)
    for start in tl.range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + offs_d, mask=offs_d < D, other=0.0).to(ACC)
        tl.store(unit_ptr + offs_d, divide(x, norm), mask=offs_d < D)


def unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of ``x`` scaled to length one, and their norms, ``[N, 1]``."""
    N, D = x.shape
    unit = torch.empty(N, D, dtype=acc_of(x.dtype), device=x.device)
    norm = torch.empty(N, 1, dtype=unit.dtype, device=x.device)
    if N == 0:
        return unit, norm
    x = with_dense_rows(x)
    _unit_rows_kernel[(N,)](
        x,
        unit,
        norm,
        D,
        x.stride(0),
        BLOCK_D=min(4096, triton.next_power_of_2(max(D, 1))),
        ACC=triton_acc_of(x.dtype),
        num_warps=8,
    )
    return unit, norm


def block_for(N: int, M: int) -> int:
    """Rows of a tile, of either side."""
    return 16 if max(N, M) <= 16 else 32


def warps_for(block: int) -> int:
    """Warps of a program over tiles of so many rows, with which nothing is spilled."""
    return 8 if block == 32 else 4


class TileBuffers:
    """What the programs of a launch over tiles of ``[N, M]`` share, and their tiling."""

    def __init__(self, N: int, M: int, D: int, block_k: int, device: torch.device) -> None:
        self.block = block_for(N, M)
        self.block_k = block_k
        self.tiles = triton.cdiv(N, self.block) * triton.cdiv(M, self.block)
        self.split = split_for(self.tiles, triton.cdiv(D, block_k))
        self.parts = torch.empty(self.split, N, M, dtype=torch.float32, device=device)
        squares = (self.tiles, 2 * self.split, self.block)
        self.squares = torch.empty(squares, dtype=torch.float32, device=device)
        self.locks = arrivals(device, self.tiles)

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's constants."""
        return {"BLOCK": self.block, "BLOCK_K": self.block_k, "SPLIT": self.split}


def is_few(N: int, M: int) -> bool:
    """Whether so many rows are for one launch over tiles, not for cuBLAS."""
    tiles: int = triton.cdiv(N, 32) * triton.cdiv(M, 32)
    return tiles <= _MOST_TILES


def cosine_similarity(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(cos, x_norm, y_norm)``; see :func:`tli_engine.ops.cosine_similarity`."""
    (N, D), M = x.shape, y.shape[0]
    if x.dtype == torch.float64 or not is_few(N, M) or 0 in (N, M, D):
        (x_unit, x_norm), (y_unit, y_norm) = unit_rows(x), unit_rows(y)
        return x_unit @ y_unit.T, x_norm, y_norm
    x, y = with_dense_rows(x), with_dense_rows(y)
    cos = torch.empty(N, M, dtype=torch.float32, device=x.device)
    x_norm, y_norm = cos.new_empty(N, 1), cos.new_empty(M, 1)
    shared = TileBuffers(N, M, D, BLOCK_K, x.device)
    _cosine_few_kernel[(shared.tiles, shared.split)](
        x,
        y,
        cos,
        x_norm,
        y_norm,
        shared.parts,
        shared.squares,
        shared.locks,
        N,
        M,
        D,
        x.stride(0),
        y.stride(0),
        **shared.constants,
        num_warps=warps_for(shared.block),
    )
    return cos, x_norm, y_norm
