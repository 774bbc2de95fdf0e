"""Which kernel runs a product with an NF4 weight, and with which tile: a lookup, never a timing."""

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from tli_engine.kernels.nf4_tuned import TUNED


class Tile(NamedTuple):
    """A launch configuration of a fused kernel; ``split`` parts of the contraction run apart."""

    block_m: int
    block_n: int
    split: int
    num_warps: int
    num_stages: int


# byte planes of the 16 codes rounded to bf16, and to fp16: low bytes, then high bytes
_TABLES = {
    torch.bfloat16: (
        *(0xCA063280, 0x00BA3D92, 0xAD7C25A3, 0x803910E2),
        *(0xBEBFBFBF, 0x00BDBEBE, 0x3E3E3E3D, 0x3F3F3F3E),
    ),
    torch.float16: (
        *(0x52339200, 0x00D4EA8D, 0x68E02618, 0x00C9800D),
        *(0xB6B8B9BC, 0x00ADB1B4, 0x3533312D, 0x3C393837),
    ),
}


@cache
def _table(device: torch.device, dtype: torch.dtype) -> Tensor:
    words = torch.tensor(_TABLES[dtype], dtype=torch.int64)
    return words.to(torch.int32).to(device)


def fast_table(x: Tensor) -> Tensor:
    """Byte planes of the codes rounded to ``x``'s dtype."""
    return _table(x.device, x.dtype)


def bucket(M: int) -> int:
    """Rows rounded up to a power of two from 16: the unit of tuning."""
    return max(16, 1 << (M - 1).bit_length())


@cache
def _device(device: torch.device) -> tuple[tuple[int, int], int]:
    if device.type != "cuda":
        return (9, 0), 132
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


def choose_tile(
    direction: str, x: Tensor, M: int, N: int, K: int, block_size: int, absmax: Tensor
) -> Tile | None:
    """Tile of the fused kernel for ``fwd`` or ``dx``, or None: dequantise, then cuBLAS."""
    if x.dtype not in _TABLES or block_size != 64 or K % 128 or absmax.dtype != torch.float32:
        return None
    capability, processors = _device(x.device)
    # no conversion of pairs to bf16, no bf16 on the tensor cores
    if capability < (8, 0):
        return None
    tuned = TUNED.get((capability, direction, N, K, bucket(M)), ())
    if tuned is None:
        return None
    if tuned:
        return Tile(*tuned)
    return default_tile(direction, capability, processors, M, N, K)


def default_tile(
    direction: str, capability: tuple[int, int], processors: int, M: int, N: int, K: int
) -> Tile | None:
    """What an untuned shape gets; see ``python -m bench.tune``."""
    hopper = capability == (9, 0)
    # beyond, decoding once for each 128 rows costs more than writing the weight out
    if bucket(M) > (128 if hopper else 64):
        return None
    block_m = bucket(M)
    if direction == "fwd":
        # 4 warps would spill
        block_n, warps, stages = 128, 8 if block_m >= 64 else 4, 3
        programs, steps = triton.cdiv(M, block_m) * triton.cdiv(N, block_n), K // 128
    else:
        block_n, warps, stages = 64, 4, 3
        programs, steps = triton.cdiv(M, block_m) * (K // 128), triton.cdiv(N, block_n)
    split = 1
    # two programs on each multiprocessor, each of at least four steps
    while split < 16 and programs * split < 2 * processors and steps >= 8 * split:
        split *= 2
    return Tile(block_m, block_n, split, warps, stages)
