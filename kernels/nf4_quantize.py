"""A weight to NF4 in one streaming launch: absmax, code and packing while a block is in registers.

The nearest of 16 codes takes one comparison, not 15: a cubic of the scaled weight, rounded, is the code
or the one below it, by a margin of 0.03.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tli_engine.kernels.overlap import INTERPRET

# half-way between neighbouring codes, as fp32; the last is never passed
_THRESHOLDS = [
    *(-0.8480963706970215, -0.6106328964233398, -0.4599952697753906, -0.33967941999435425),
    *(-0.23460739850997925, -0.13791173696517944, -0.045525018125772476, 0.03979014977812767),
    *(0.120255246758461, 0.2035212516784668, 0.2920137643814087, 0.3893125355243683),
    *(0.5016634464263916, 0.6427869200706482, 0.8614784479141235, float("inf")),
]


@triton.jit(do_not_specialize=["blocks"])
def _nf4_quantize_kernel(
    weight_ptr,
    threshold_ptr,
    packed_ptr,
    absmax_ptr,
    numel,
    blocks,
    ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SHORT: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    # int64: an expert stack passes 2**31 weights
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    keep_block = block < blocks
    offs = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    offs_byte = block[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
    if SHORT:
        keep = offs < numel
        keep_byte = 2 * offs_byte < numel
    else:
        # masks of whole rows leave the accesses 16 bytes wide
        keep = tl.broadcast_to(keep_block[:, None], (ROWS, BLOCK_SIZE))
        keep_byte = tl.broadcast_to(keep_block[:, None], (ROWS, BLOCK_SIZE // 2))
    x = tl.load(weight_ptr + offs, mask=keep, other=0.0).to(tl.float32)
    # as integers, magnitudes compare alike, and NaN is above infinity instead of being dropped
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    absmax = bits.to(tl.float32, bitcast=True)
    # a literal this small would be fp64
    divisor = tl.maximum(absmax, tl.full((ROWS,), 1e-38, tl.float32))
    scaled = x * tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), divisor)[:, None]
    if SHORT:
        # bitsandbytes divides a short last block, and stores the clamped absmax
        short = (block + 1) * BLOCK_SIZE > numel
        divided = tl.div_rn(x, tl.broadcast_to(divisor[:, None], (ROWS, BLOCK_SIZE)))
        scaled = tl.where(short[:, None], divided, scaled)
        absmax = tl.where(short & (absmax == absmax), divisor, absmax)
    # 12582919 is 7 + 1.5 * 2**23, adding which leaves the nearest integer in the low bits
    below = ((-4.75262 * scaled - 0.44051) * scaled + 11.72748) * scaled + 12582919.0
    below = below.to(tl.int32, bitcast=True) & 15
    if PORTABLE:
        threshold = tl.load(threshold_ptr + below)
    else:
        # a tl.load would be laid out anew for coalescing, at 10 instructions a weight (Triton 3.6)
        threshold = tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];",
            "=f,l",
            [(threshold_ptr + below).to(tl.int64)],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    code = below + (scaled > threshold).to(tl.int32)
    if SHORT:
        # bitsandbytes fills the last nibble of an odd number of weights with a zero
        code = tl.where(keep, code, 7)
    first, second = tl.split(tl.reshape(code, (ROWS, BLOCK_SIZE // 2, 2)))
    tl.store(packed_ptr + offs_byte, ((first << 4) | second).to(tl.uint8), mask=keep_byte)
    tl.store(absmax_ptr + block, absmax, mask=keep_block)


@cache
def _thresholds(device: torch.device) -> Tensor:
    return torch.tensor(_THRESHOLDS, dtype=torch.float32, device=device)


def nf4_quantize(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Launch the kernel; arguments are those of ``tli_engine::nf4_quantize``."""
    weight = weight.contiguous()
    numel = weight.numel()
    blocks = triton.cdiv(numel, block_size)
    packed = torch.empty((numel + 1) // 2, 1, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=weight.device)
    if numel == 0:
        return packed, absmax
    # one warp and 32 weights a thread: the fastest of 8-128 rows and 1-8 warps on an H200
    rows = max(1, 1024 // block_size)
    _nf4_quantize_kernel[(triton.cdiv(blocks, rows),)](
        weight,
        _thresholds(weight.device),
        packed,
        absmax,
        numel,
        blocks,
        ROWS=rows,
        BLOCK_SIZE=block_size,
        SHORT=numel % block_size != 0,
        PORTABLE=INTERPRET,
        num_warps=max(1, block_size // 1024),
    )
    return packed, absmax
