"""The order of an NF4 weight's bytes that the Hopper kernel streams, and back; lossless.

A record holds 64 rows by 64 columns of the contraction, each row a block of one absmax: 2048 bytes
of codes, then 64 fp32 scales. The codes lie as ``wgmma`` wants its left operand in registers
(PTX ISA, "Register fragments for wgmma.mma_async.m64nNk16", matrix A), so that a thread loads its
16 bytes at once. With a row ``16 warp + 8 half + r`` and a column ``16 step + 8 part + 2 c + e``,
byte ``[warp, r, c, step, part, half]`` holds the columns ``e = 0`` (high nibble) and ``e = 1``.

For the forward product ``x @ W.T`` the rows are W's and the scales ``[warp, r, half]``, one a row.
For ``dy @ W`` (``transposed``) the rows are W's columns; 64 of them share a block, so that a scale
belongs to a column of the contraction: ``[step, c, part, e]``, so that the loads of a warp do not
meet in a bank.

A contraction that is no multiple of 128 is filled up by codes of zero and scales of zero.
"""

import torch
from torch import Tensor

# bytes of the codes, and of a record
_CODES = 2048
RECORD_BYTES = _CODES + 256
# two codes of zero
_ZEROS = 0x77


def to_records(packed: Tensor, absmax: Tensor, N: int, K: int, transposed: bool) -> Tensor:
    """Lay out a weight for one direction of the product.

    Args:
        packed: bitsandbytes' bytes, ``[N * K / 2, 1]``, uint8, of blocks of 64.
        absmax: ``[N * K / 64]``, fp32.
        N: Rows of the weight, a multiple of 64.
        K: Columns of the weight, a multiple of 64.
        transposed: False for ``x @ W.T``, True for ``dy @ W``.

    Returns:
        Records, ``[rows / 64, 2 * ceil(contraction / 128), 2304]``, uint8, contiguous.
    """
    codes, scales = packed.view(N, K // 2), absmax.view(N, K // 64)
    rows, contraction = (K, N) if transposed else (N, K)
    if transposed:
        codes, scales = _transpose_nibbles(codes), scales.t()
    columns = -(-contraction // 128) * 2
    fill = columns * 64 - contraction
    codes = torch.nn.functional.pad(codes, (0, fill // 2), value=_ZEROS)
    # a scale for each 64 elements along the contraction, or along the rows
    scales = torch.nn.functional.pad(scales, (0, fill if transposed else fill // 64))
    # [row block, warp, half, r, column block, step, part, c]
    codes = codes.view(rows // 64, 4, 2, 8, columns, 4, 2, 4).permute(0, 4, 1, 3, 7, 5, 6, 2)
    if transposed:
        # [row block, column block, step, part, c, e]
        scales = scales.reshape(rows // 64, columns, 4, 2, 4, 2).transpose(3, 4)
    else:
        # [row block, warp, half, r, column block]
        scales = scales.reshape(rows // 64, 4, 2, 8, columns).permute(0, 4, 1, 3, 2)
    shape = (rows // 64, columns)
    parts = (codes.reshape(*shape, _CODES), scales.reshape(*shape, 64).view(torch.uint8))
    return torch.cat(parts, 2)


def from_records(records: Tensor, N: int, K: int, transposed: bool) -> tuple[Tensor, Tensor]:
    """Undo :func:`to_records`, bit for bit: ``packed`` and ``absmax``."""
    rows, contraction = (K, N) if transposed else (N, K)
    blocks, columns = records.shape[:2]
    codes = records[..., :_CODES].reshape(blocks, columns, 4, 8, 4, 4, 2, 2)
    codes = codes.permute(0, 2, 7, 3, 1, 5, 6, 4).reshape(rows, columns * 32)
    codes = codes[:, : contraction // 2]
    scales = records[..., _CODES:].contiguous().view(torch.float32)
    if transposed:
        scales = scales.view(blocks, columns, 4, 4, 2, 2).transpose(3, 4)
        scales = scales.reshape(blocks, columns * 64)[:, :contraction].t()
        codes = _transpose_nibbles(codes)
    else:
        scales = scales.view(blocks, columns, 4, 8, 2).permute(0, 2, 4, 3, 1)
        scales = scales.reshape(rows, columns)[:, : contraction // 64]
    return codes.reshape(-1, 1).contiguous(), scales.reshape(-1).contiguous()


def _transpose_nibbles(packed: Tensor) -> Tensor:
    """Bytes ``[rows, columns / 2]`` of a matrix, to those of its transpose."""
    rows, width = packed.shape
    nibbles = torch.stack([packed >> 4, packed & 15], 2).view(rows, 2 * width).t()
    return (nibbles[:, ::2] << 4) | nibbles[:, 1::2]
