"""Products with an NF4 weight, in plain PyTorch: decode it in full, then multiply.

Tiled bytes are a permutation of bitsandbytes' in which the kernels read a weight as one stream and
find its columns in order: ``[K / 128, N, 64]``, and each block's 32 bytes an 8 x 4 transposed.
"""

import torch
from torch import Tensor

from tli_engine.reference.nf4_dequantize import nf4_dequantize


def tile(packed: Tensor, absmax: Tensor, N: int, K: int) -> tuple[Tensor, Tensor]:
    """Lay out bytes ``[N * K / 2, 1]`` and fp32 absmax for the kernels; blocks of 64, K of 128."""
    tiled = packed.view(N, K // 128, 2, 8, 4).permute(1, 0, 2, 4, 3).reshape(-1, 1)
    return tiled, absmax.view(N, K // 128, 2).transpose(0, 1).reshape(-1)


def untile(packed: Tensor, absmax: Tensor, N: int, K: int) -> tuple[Tensor, Tensor]:
    """Undo :func:`tile`, bit for bit."""
    plain = packed.view(K // 128, N, 2, 4, 8).permute(1, 0, 2, 4, 3).reshape(-1, 1)
    return plain, absmax.view(K // 128, N, 2).transpose(0, 1).reshape(-1)


def decoded(
    packed: Tensor, absmax: Tensor, N: int, K: int, block_size: int, tiled: bool, dtype: torch.dtype
) -> Tensor:
    """Return the weight, ``[N, K]``: bitsandbytes' values, the ones that enter the product."""
    if tiled:
        packed, absmax = untile(packed, absmax, N, K)
    none = (None, None, None)
    return nf4_dequantize(packed, absmax, *none, (N, K), dtype, block_size, 256)


def nf4_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    N: int,
    block_size: int,
    tiled: bool,
    fast: bool,
) -> Tensor:
    """Return ``x @ W.T + bias``; see :func:`tli_engine.ops.nf4_linear`. ``fast`` gains nothing."""
    weight = decoded(packed, absmax, N, x.shape[1], block_size, tiled, x.dtype)
    return torch.nn.functional.linear(x, weight, bias)
