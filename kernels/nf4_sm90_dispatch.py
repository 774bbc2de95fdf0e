"""Which CUDA C++ product (``csrc/``) runs a shape, how it is cut up, and the launch: a lookup, never a timing."""

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from tli_engine.kernels.nf4_sm90_tuned import TUNED
from tli_engine.kernels.semaphores import semaphores

# a second product rides along if it is this narrow, a multiple of 8 ranks, in so many groups
MAX_RANKS, MAX_GROUPS = 64, 3
# rows of x, and 64 columns of the contraction a CTA, that the product for few rows takes
GEMV_M, GEMV_COLUMNS = 8, 64
# rows from which decoding for cuBLAS took 0.9 of the time, but of fast forward products; see bench/LOG.md
_DECODE_ROWS = 6144


class Tile(NamedTuple):
    """How a product is cut up; ``csrc/nf4_linear_sm90.h`` says what each means."""

    block_m: int
    blocks_per_warpgroup: int
    warpgroups: int
    ctas_per_sm: int
    mode: int
    split: int
    grid: int
    cluster: int = 1


class Gemv(NamedTuple):
    """How a product with at most ``GEMV_M`` rows is cut up: a CTA for each part and group."""

    block_rows: int  # 64 or 32
    split: int  # parts of the contraction
    groups: int  # of blocks of rows


def bucket(M: int) -> int:
    """Rows rounded up to a power of two from 8: the unit of tuning."""
    return max(8, 1 << (M - 1).bit_length())


def measured_rows(M: int) -> tuple[int, ...]:
    """Numbers of rows whose measured tile suits ``M``, the nearest first.

    From 65 on there may be one for three quarters of a power of two: 257 rows would take two tiles
    of 256, or three of 128.
    """
    if M > 1024:
        # 2048 is not measured: its neighbours differ most by what cuBLAS does on the way back
        return (1024,) if M <= 2048 else (4096,)
    whole = bucket(M)
    return (whole * 3 // 4, whole) if 64 < M <= whole * 3 // 4 else (whole,)


def choose_tile(
    direction: str, M: int, rows: int, contraction: int, fast: bool, device: torch.device
) -> Tile | Gemv | None:
    """The measured choice of the shape's bucket, or one by rule; None: dequantise, then cuBLAS."""
    return _choose(direction, M, rows, contraction, fast, processors(device))


@cache
def _choose(
    direction: str, M: int, rows: int, contraction: int, fast: bool, count: int
) -> Tile | Gemv | None:
    if M > _DECODE_ROWS and (direction == "dx" or not fast):
        return None
    keys = [(direction, rows, contraction, measured, fast) for measured in measured_rows(M)]
    key = next((key for key in keys if key in TUNED), None)
    if key is None:
        # records of over 4 GB are past the kernels' offsets
        fits = rows * contraction * 9 // 16 < 2**32
        # on the way back cuBLAS was faster for all shapes measured
        many = direction == "dx" and M > 2048
        return _default(M, rows, contraction, count) if fits and not many else None
    known: tuple[int, ...] | None = TUNED[key]
    if known is None:
        return None
    if len(known) == len(Gemv._fields):
        return Gemv(*known)
    tile = Tile(*known)
    tiles = triton.cdiv(M, tile.block_m) * _row_tiles(rows, tile)
    # another GPU may have fewer multiprocessors, and a bucket's other M more tiles
    ctas = tile.grid if tile.mode == 0 else tiles * tile.split * tile.cluster
    if ctas <= count * tile.ctas_per_sm:
        return tile
    return default_tile(M, rows, contraction, count)


def _default(M: int, rows: int, contraction: int, processors: int) -> Tile | Gemv:
    gemv = default_gemv(rows, contraction, processors) if M <= GEMV_M else None
    return gemv or default_tile(M, rows, contraction, processors)


def default_gemv(rows: int, contraction: int, processors: int) -> Gemv | None:
    """What few rows get: the cut whose busiest CTA reads least; None: too long."""
    best: tuple[int, Gemv] | None = None
    for gemv in gemv_cuts(rows, contraction, processors):
        deep = triton.cdiv(rows // gemv.block_rows, gemv.groups)
        columns = triton.cdiv(contraction // 64, gemv.split)
        # in rows of records: 16 warps share columns, meet for each block, and add parts at the end
        cost = deep * gemv.block_rows * (triton.cdiv(columns, 16) * 16)
        cost += deep * 512 + (256 * gemv.split if gemv.split > 1 else 0)
        if best is None or cost < best[0]:
            best = cost, gemv
    return best and best[1]


def gemv_cuts(rows: int, contraction: int, processors: int) -> list[Gemv]:
    """Cuts of a CTA a multiprocessor at most, whose groups have as many blocks each."""
    columns, cuts = contraction // 64, []
    # more parts than these only add sums
    for split in range(triton.cdiv(columns, GEMV_COLUMNS), min(columns, processors, 32) + 1):
        for block_rows in (64, 32):
            blocks = rows // block_rows
            deep = triton.cdiv(blocks, min(blocks, processors // split))
            cuts.append(Gemv(block_rows, split, triton.cdiv(blocks, deep)))
    return cuts


def default_tile(M: int, rows: int, contraction: int, processors: int) -> Tile:
    """What an untuned shape gets: tall tiles for many rows, split where tiles are few."""
    block_m = next((m for m in (16, 32, 64, 128) if m >= M), 256)
    # four warpgroups hide decoding, where enough tiles remain
    wide = block_m <= 32 or (block_m == 64 and rows >= 64 * processors)
    shape = (block_m, 1, 4 if wide else 2, 1)
    tiles = triton.cdiv(M, block_m) * _row_tiles(rows, Tile(*shape, 0, 1, 0))
    split = min(8, processors // tiles, contraction // 128)
    if split >= 2:
        return Tile(*shape, 1, split, 0)
    return Tile(*shape, 0, 1, processors if tiles > processors else 0)


def _row_tiles(rows: int, tile: Tile) -> int:
    blocks = tile.blocks_per_warpgroup * tile.warpgroups * tile.cluster
    count: int = triton.cdiv(rows, 64 * blocks)
    return count


@cache
def _workspace(rows: int, M: int, tile: Tile | Gemv, processors: int) -> tuple[int, int]:
    if isinstance(tile, Gemv):
        return (tile.split * rows * M, tile.groups) if tile.split > 1 else (0, 0)
    sizes: tuple[int, int] = torch.ops.tli_engine.nf4_linear_sm90_workspace(
        rows, M, list(tile), processors
    )
    return sizes


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous, on a 16-byte boundary, as bulk copies want it: a view may miss one."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def launch(
    x: Tensor,
    records: Tensor,
    rows: int,
    transposed: bool,
    fast: bool,
    tile: Tile | Gemv,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, list[int]] | None = None,
) -> Tensor:
    """Return ``x @ R.T``, ``[M, rows]``, and add the narrow product of ``lora``.

    Args:
        x: ``[M, contraction]``, contiguous, 16 bits, M at least 1.
        records: Of W, or of its transpose.
        rows: Rows of what is recorded.
        transposed: Whether the records are of the transpose.
        fast: Whether codes and scales may be rounded before they are multiplied.
        tile: How the product is cut up; see :func:`choose_tile`.
        bias: ``[rows]`` in ``x``'s dtype.
        lora: ``(s, B, sizes)``, or transposed ``(t, A, [rows])``.
    """
    M, contraction = x.shape
    floats, flags = _workspace(rows, M, tile, processors(x.device))
    lora_x, lora_b, sizes = lora or (None, None, [])
    bias, lora_b = (None if t is None else _aligned(t) for t in (bias, lora_b))
    x = _aligned(x)
    ops = torch.ops.tli_engine
    op = ops.nf4_gemv_sm90 if isinstance(tile, Gemv) else ops.nf4_linear_sm90
    y: Tensor = op.default(
        *(x, records, bias, lora_x, lora_b, sizes, rows, contraction, transposed, not fast),
        list(tile),
        torch.empty(floats, dtype=torch.float32, device=x.device),
        semaphores(x.device, flags) if flags else x.new_empty(0, dtype=torch.int32),
    )
    return y
