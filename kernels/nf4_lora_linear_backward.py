"""Gradients of ``nf4_lora_linear``: of the input through the frozen weight, and of the adapter."""

import torch
from torch import Tensor

from tli_engine.kernels.counter_dropout import counter_dropout
from tli_engine.kernels.nf4_dequantize import dequantize_tiles
from tli_engine.kernels.nf4_dispatch import choose_tile
from tli_engine.kernels.nf4_linear_dx import fused_dx
from tli_engine.kernels.nf4_lora_linear import group_slices, scaled


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` in the adapter's dtype: an fp32 gradient is not rounded to 16 bits first."""
    if dtype == torch.float32 and a.dtype != dtype and a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def nf4_lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    packed: Tensor,
    absmax: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    sizes: list[int],
    scaling: float,
    dropout: float,
    block_size: int,
    tiled: bool,
    fast: bool,
    needs_dx: bool,
    needs_lora: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch what suits the shape; arguments are those of ``tli_engine::nf4_lora_linear_backward``."""
    dy, x = dy.contiguous(), x.contiguous()
    (M, N), K, rank = dy.shape, x.shape[1], lora_B.shape[1]
    groups = list(enumerate(group_slices(sizes)))
    b = scaled(lora_B, scaling, dy.dtype)
    t = torch.empty(M, rank * len(sizes), dtype=dy.dtype, device=dy.device)
    for group, rows in groups:
        torch.mm(dy[:, rows], b[rows], out=t[:, group * rank : (group + 1) * rank])
    dx, dA, dB = dy.new_empty(0), lora_A.new_empty(0), lora_B.new_empty(0)
    if needs_dx:
        tile = choose_tile("dx", dy, M, N, K, block_size, absmax) if M else None
        dx = t @ lora_A.to(dy.dtype)
        if seed is not None:
            dx = counter_dropout(dx, seed, dropout)
        if tile is None:
            # cuBLAS adds to the update under its own arithmetic
            weight = dequantize_tiles(packed, absmax, N, K, dy.dtype, block_size, tiled)
            dx = dx.addmm_(dy, weight)
        else:
            dx = dx.add_(fused_dx(dy, packed, absmax, K, tiled, fast, tile))
    if needs_lora:
        dropped = x if seed is None else counter_dropout(x, seed, dropout)
        dA = _product(t.T, dropped, lora_A.dtype)
        dB = torch.cat(
            [
                _product(dy[:, rows].T, s[:, group * rank : (group + 1) * rank], lora_B.dtype)
                for group, rows in groups
            ]
        )
    return dx, dA, dB
