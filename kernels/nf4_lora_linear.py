"""``x @ W.T + s * (x @ A.T) @ B.T``: the update rides in the accumulators of the frozen product.

Beside a fused product ``B`` is one more step of the tensor cores; beside cuBLAS the update is written
first, and cuBLAS adds to it under its own arithmetic. Either way the output is written once more at
most. Projections that share an input run as one: one ``x @ A.T``, ``B`` block-diagonal.
"""

import torch
from torch import Tensor

from tli_engine.kernels.counter_dropout import counter_dropout
from tli_engine.kernels.nf4_dequantize import dequantize_tiles
from tli_engine.kernels.nf4_dispatch import choose_tile
from tli_engine.kernels.nf4_linear import fused_forward


def scaled(tensor: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """``tensor * scaling``, rounded once, in one launch."""
    return torch.mul(tensor, scaling, out=torch.empty_like(tensor, dtype=dtype))


def group_slices(sizes: list[int]) -> list[slice]:
    """Rows of each group."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def nf4_lora_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    sizes: list[int],
    scaling: float,
    dropout: float,
    block_size: int,
    tiled: bool,
    fast: bool,
) -> tuple[Tensor, Tensor]:
    """Launch what suits the shape; arguments are those of ``tli_engine::nf4_lora_linear``."""
    x = x.contiguous()
    M, K = x.shape
    N, rank = lora_B.shape
    dropped = x if seed is None else counter_dropout(x, seed, dropout)
    s = dropped @ scaled(lora_A, scaling, x.dtype).T
    if M == 0:
        return x.new_empty(0, N), s
    tile = choose_tile("fwd", x, M, N, K, block_size, absmax)
    # wider, the update's operands would crowd the weights out of shared memory
    if tile is not None and len(sizes) <= 3 and rank * len(sizes) <= 64:
        lora = (s, lora_B.contiguous(), sizes)
        return fused_forward(x, packed, absmax, bias, N, tiled, fast, tile, lora), s
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    b = lora_B.to(x.dtype)
    for group, rows in enumerate(group_slices(sizes)):
        part = s[:, group * rank : (group + 1) * rank]
        if bias is None:
            torch.mm(part, b[rows].T, out=y[:, rows])
        else:
            torch.addmm(bias[rows], part, b[rows].T, out=y[:, rows])
    weight = dequantize_tiles(packed, absmax, N, K, x.dtype, block_size, tiled)
    return y.addmm_(x, weight.T), s
