"""Which tile of the CUDA C++ product (``csrc/``) runs a shape, and the launch: a lookup, never a timing."""

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from tli_engine.kernels.nf4_sm90_tuned import TUNED
from tli_engine.kernels.semaphores import semaphores

# a second product rides along if it is this narrow, a multiple of 8 ranks, in so many groups
MAX_RANKS, MAX_GROUPS = 64, 3


class Tile(NamedTuple):
    """How a product is cut up; ``csrc/nf4_linear_sm90.h`` says what each means."""

    block_m: int
    blocks_per_warpgroup: int
    warpgroups: int
    ctas_per_sm: int
    mode: int
    split: int
    grid: int


def bucket(M: int) -> int:
    """Rows rounded up to a power of two from 8: the unit of tuning."""
    return max(8, 1 << (M - 1).bit_length())


def choose_tile(
    direction: str, M: int, rows: int, contraction: int, fast: bool, device: torch.device
) -> Tile | None:
    """The measured tile of the shape's bucket, or one by rule; None: dequantise, then cuBLAS."""
    return _choose(direction, M, rows, contraction, fast, processors(device))


@cache
def _choose(
    direction: str, M: int, rows: int, contraction: int, fast: bool, count: int
) -> Tile | None:
    key = (direction, rows, contraction, min(bucket(M), 4096), fast)
    if key not in TUNED:
        # records of over 4 GB are past the kernel's offsets
        fits = rows * contraction * 9 // 16 < 2**32
        return default_tile(M, rows, contraction, count) if fits else None
    known = TUNED[key]
    if known is None:
        return None
    tile = Tile(*known)
    tiles = triton.cdiv(M, tile.block_m) * _row_tiles(rows, tile)
    # a bucket's other M may have more tiles than the one measured
    if tile.mode == 0 or tiles * tile.split <= count * tile.ctas_per_sm:
        return tile
    return default_tile(M, rows, contraction, count)


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
    count: int = triton.cdiv(rows, 64 * tile.blocks_per_warpgroup * tile.warpgroups)
    return count


@cache
def _workspace(rows: int, M: int, tile: Tile, processors: int) -> tuple[int, int]:
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
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, list[int]] | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Return ``x @ R.T``, ``[M, rows]``, and add the narrow product of ``lora``.

    Args:
        x: ``[M, contraction]``, contiguous, 16 bits, M at least 1.
        records: Of W, or of its transpose.
        rows: Rows of what is recorded.
        transposed: Whether the records are of the transpose.
        fast: Whether codes and scales may be rounded before they are multiplied.
        bias: ``[rows]`` in ``x``'s dtype.
        lora: ``(s, B, sizes)``, or transposed ``(t, A, [rows])``.
        tile: Instead of the dispatched one.
    """
    M, contraction = x.shape
    count = processors(x.device)
    if tile is None:
        direction = "dx" if transposed else "fwd"
        tile = _choose(direction, M, rows, contraction, fast, count)
        assert tile is not None, "the caller asks choose_tile first"
    floats, flags = _workspace(rows, M, tile, count)
    lora_x, lora_b, sizes = lora or (None, None, [])
    bias, lora_b = (None if t is None else _aligned(t) for t in (bias, lora_b))
    x = _aligned(x)
    y: Tensor = torch.ops.tli_engine.nf4_linear_sm90.default(
        *(x, records, bias, lora_x, lora_b, sizes, rows, contraction, transposed, not fast),
        list(tile),
        torch.empty(floats, dtype=torch.float32, device=x.device),
        semaphores(x.device, flags) if flags else x.new_empty(0, dtype=torch.int32),
    )
    return y
