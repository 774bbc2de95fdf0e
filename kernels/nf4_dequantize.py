"""NF4 to fp32, fp16 or bf16, plain or double quantised, in one streaming launch.

A double quantised absmax is decoded in the same program, where bitsandbytes takes three launches
and a trip of the absmax through memory. Whole rows of 128 weights to 16 bits take the decoder of the
fused matmuls, 1.2 times as fast on an H200 as a table lookup for each weight.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tli_engine.kernels.nf4_tile import code_of, decode_pairs, decode_tile, load_scale, round_to
from tli_engine.kernels.overlap import INTERPRET


@triton.jit
def _load_absmax(
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    nested_offset_ptr,
    block,
    keep,
    NESTED_BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
):
    if NESTED:
        index = tl.load(absmax_ptr + block, mask=keep, other=0).to(tl.int32)
        outer = tl.load(nested_absmax_ptr + block // NESTED_BLOCK_SIZE, mask=keep, other=0.0)
        # two roundings, as in bitsandbytes: launched with enable_fp_fusion=False
        absmax = tl.load(nested_code_ptr + index) * outer + tl.load(nested_offset_ptr)
    else:
        absmax = tl.load(absmax_ptr + block, mask=keep, other=0.0)
    return absmax


@triton.jit
def _dequantize_rows_kernel(
    word_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    nested_offset_ptr,
    weight_ptr,
    rows,
    ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    # rows of 128 weights; int64: an expert stack passes 2**31 weights
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    keep = (row < rows)[:, None]
    word = tl.load(word_ptr + row[:, None] * 16 + tl.arange(0, 16)[None, :], mask=keep, other=0)
    BLOCKS: tl.constexpr = 128 // BLOCK_SIZE if BLOCK_SIZE < 128 else 1
    block = row[:, None] * 128 // BLOCK_SIZE + tl.arange(0, BLOCKS)[None, :]
    absmax = _load_absmax(
        absmax_ptr,
        nested_absmax_ptr,
        nested_code_ptr,
        nested_offset_ptr,
        block,
        keep,
        NESTED_BLOCK_SIZE,
        NESTED,
    )
    scale = tl.broadcast_to(absmax[:, :, None], (ROWS, BLOCKS, 16 // BLOCKS))
    scale = tl.reshape(scale, (ROWS, 16))
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    pairs = decode_pairs(word, scale, 0, ROWS, dtype, False, PORTABLE)
    weight = tl.reshape(tl.permute(pairs, (0, 1, 5, 4, 3, 2)), (ROWS, 128))
    offs = row[:, None] * 128 + tl.arange(0, 128)[None, :]
    tl.store(weight_ptr + offs, weight, mask=keep)


@triton.jit
def _dequantize_tiled_kernel(
    word_ptr,
    absmax_ptr,
    weight_ptr,
    N,
    K,
    stride_n,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    # a few tiles of a few rows, so that reads and writes are runs of some hundred bytes at least
    index = tl.arange(0, ROWS * TILES)
    row = tl.program_id(0) * ROWS + index // TILES
    tile = tl.program_id(1) * TILES + index % TILES
    keep = (row < N) & (tile < K // 128)
    start = (row.to(tl.int64) + tile * N) * 16
    offs_word = start[:, None] + tl.arange(0, 16)[None, :]
    word = tl.load(word_ptr + offs_word, mask=keep[:, None], other=0)
    scale = load_scale(absmax_ptr, row, tile, keep, N, K, ROWS * TILES, True)
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    weight = decode_tile(word, scale, 0, ROWS * TILES, dtype, False, PORTABLE)
    offs = row.to(tl.int64)[:, None] * stride_n + (tile * 128)[:, None] + tl.arange(0, 128)[None, :]
    tl.store(weight_ptr + offs, weight, mask=keep[:, None])


@triton.jit
def _dequantize_bytes_kernel(
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    nested_offset_ptr,
    weight_ptr,
    numel,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
    NESTED: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    # any size and dtype; a row lies within one quantisation block
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs_byte = row[:, None] * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)[None, :]
    packed = tl.load(packed_ptr + offs_byte, mask=2 * offs_byte < numel, other=0).to(tl.int32)
    absmax = _load_absmax(
        absmax_ptr,
        nested_absmax_ptr,
        nested_code_ptr,
        nested_offset_ptr,
        row // (BLOCK_SIZE // COLUMNS),
        row * COLUMNS < numel,
        NESTED_BLOCK_SIZE,
        NESTED,
    )
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    first = round_to(code_of(packed >> 4) * absmax[:, None], dtype, PORTABLE)
    second = round_to(code_of(packed & 15) * absmax[:, None], dtype, PORTABLE)
    offs = row[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(weight_ptr + offs, tl.interleave(first, second), mask=offs < numel)


def _has_pair_conversion(packed: Tensor) -> bool:
    """Whether the GPU converts pairs of fp32 to bf16: from Ampere on."""
    return INTERPRET or torch.cuda.get_device_capability(packed.device) >= (8, 0)


def nf4_dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    shape: list[int],
    dtype: torch.dtype,
    block_size: int,
    nested_block_size: int,
) -> Tensor:
    """Launch a kernel; arguments are those of ``tli_engine::nf4_dequantize``."""
    weight = torch.empty(shape, dtype=dtype, device=packed.device)
    numel = math.prod(shape)
    if numel == 0:
        return weight
    statistics = (
        absmax,
        absmax if nested_absmax is None else nested_absmax,
        absmax if nested_code is None else nested_code,
        absmax if nested_offset is None else nested_offset.view(1),
    )
    options = {
        "BLOCK_SIZE": block_size,
        "NESTED_BLOCK_SIZE": nested_block_size,
        "NESTED": nested_absmax is not None,
        "PORTABLE": INTERPRET,
        "enable_fp_fusion": False,
    }
    # a narrow view of a file's bytes may not lie on a word
    aligned = numel % 128 == 0 and packed.data_ptr() % 16 == 0
    if aligned and dtype != torch.float32 and _has_pair_conversion(packed):
        rows, words = numel // 128, packed.view(-1).view(torch.int32)
        # 16-64 rows and 1-8 warps are within 2 % on an H200
        _dequantize_rows_kernel[(triton.cdiv(rows, 32),)](
            words, *statistics, weight, rows, ROWS=32, num_warps=2, **options
        )
        return weight
    columns, rows = min(64, block_size), 32
    _dequantize_bytes_kernel[(triton.cdiv(numel, rows * columns),)](
        packed, *statistics, weight, numel, ROWS=rows, COLUMNS=columns, num_warps=2, **options
    )
    return weight


def dequantize_tiles(
    packed: Tensor,
    absmax: Tensor,
    N: int,
    K: int,
    dtype: torch.dtype,
    block_size: int,
    tiled: bool,
) -> Tensor:
    """Weight ``[N, K]`` for a matmul, from either layout.

    The result is freed after the matmul, so that PyTorch's allocator hands the same buffer to the
    next layer. A buffer kept here would be unsafe under CUDA graphs, which replay into it.
    """
    if tiled and (dtype == torch.float32 or not _has_pair_conversion(packed)):
        packed, absmax = _untile(packed, absmax, N, K)
        tiled = False
    if not tiled:
        none = (None, None, None)
        return nf4_dequantize(packed, absmax, *none, [N, K], dtype, block_size, 256)
    weight = torch.empty(N, K, dtype=dtype, device=packed.device)
    dequantize_tiles_into(weight, packed, absmax)
    return weight


def dequantize_tiles_into(weight: Tensor, packed: Tensor, absmax: Tensor) -> None:
    """Fill ``weight``, ``[N, K]`` of 16 bits, its rows any distance apart, from tiled bytes."""
    N, K = weight.shape
    # of 1-64 rows, 1-32 tiles and 1-8 warps on an H200; it writes in runs of 8 KB
    rows, tiles = 4, 32
    _dequantize_tiled_kernel[(triton.cdiv(N, rows), triton.cdiv(K // 128, tiles))](
        packed.view(-1).view(torch.int32),
        absmax,
        weight,
        N,
        K,
        weight.stride(0),
        ROWS=rows,
        TILES=tiles,
        PORTABLE=INTERPRET,
        num_warps=8,
    )


def _untile(packed: Tensor, absmax: Tensor, N: int, K: int) -> tuple[Tensor, Tensor]:
    packed = packed.view(K // 128, N, 2, 4, 8).permute(1, 0, 2, 4, 3).reshape(-1, 1)
    return packed, absmax.view(K // 128, N, 2).transpose(0, 1).reshape(-1)
