"""Gradients of ``nf4_lora_linear``: of the input through the frozen weight, and of the adapter."""

import torch
from torch import Tensor

from tli_engine.kernels.counter_dropout import counter_dropout
from tli_engine.kernels.lora_down import is_few, is_narrow, lora_down_backward
from tli_engine.kernels.lora_dx import lora_dx
from tli_engine.kernels.lora_up_backward import is_short, lora_up_backward
from tli_engine.kernels.nf4_dequantize import dequantize_tiles, dequantize_tiles_into
from tli_engine.kernels.nf4_dispatch import choose_tile
from tli_engine.kernels.nf4_linear_dx import fused_dx
from tli_engine.kernels.nf4_lora_linear import group_slices, pays_to_append, scaled
from tli_engine.kernels.widen import PAD, widen


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
    (M, N), K = dy.shape, x.shape[1]
    if M == 0:
        empty = lora_A.new_zeros(lora_A.shape if needs_lora else (0,))
        return (
            dy.new_empty((0, K) if needs_dx else (0,)),
            empty,
            lora_B.new_zeros(lora_B.shape if needs_lora else (0,)),
        )
    narrow = is_narrow(dy, len(sizes), lora_B.shape[1])
    dx, dA, dB = dy.new_empty(0), lora_A.new_empty(0), lora_B.new_empty(0)
    if narrow and is_short(M, s.shape[1]):
        t, dB = lora_up_backward(dy, lora_B, s, sizes, scaling, needs_lora)
    else:
        t = _up_backward(dy, lora_B, sizes, scaling)
    tile = choose_tile("dx", dy, M, N, K, block_size, absmax) if narrow and needs_dx else None
    if needs_dx and tile is not None:
        lora = (t, lora_A.contiguous()) if seed is None else None
        dx = fused_dx(dy, packed, absmax, K, tiled, fast, tile, lora)
        if seed is not None:
            lora_dx(t, lora_A, seed, dropout, dx)
    # with dropout the update has a mask of its own and cannot share the product's contraction
    elif needs_dx and narrow and tiled and seed is None and pays_to_append(M, K, N):
        dx = _append(dy, t, packed, absmax, lora_A)
    elif needs_dx:
        if narrow and seed is not None:
            dx = lora_dx(t, lora_A, seed, dropout)
        else:
            dx = t @ lora_A.to(dy.dtype)
            dx = dx if seed is None else counter_dropout(dx, seed, dropout)
        # cuBLAS adds to the update under its own arithmetic
        dx = dx.addmm_(dy, dequantize_tiles(packed, absmax, N, K, dy.dtype, block_size, tiled))
    if needs_lora and narrow and is_few(M):
        dA = lora_down_backward(x, t, seed, dropout, lora_A.dtype)
    elif needs_lora:
        dropped = x if seed is None else counter_dropout(x, seed, dropout)
        dA = _product(t.T, dropped, lora_A.dtype)
    if needs_lora and dB.numel() == 0:
        rank = lora_B.shape[1]
        groups = enumerate(group_slices(sizes))
        parts = [(dy[:, rows].T, s[:, i * rank : (i + 1) * rank]) for i, rows in groups]
        dB = torch.cat([_product(*part, lora_B.dtype) for part in parts])
    return dx, dA, dB


def _up_backward(dy: Tensor, lora_B: Tensor, sizes: list[int], scaling: float) -> Tensor:
    """``scaling * dy @ B`` by group."""
    rank = lora_B.shape[1]
    b = scaled(lora_B, scaling, dy.dtype)
    t = torch.empty(dy.shape[0], rank * len(sizes), dtype=dy.dtype, device=dy.device)
    for group, rows in enumerate(group_slices(sizes)):
        torch.mm(dy[:, rows], b[rows], out=t[:, group * rank : (group + 1) * rank])
    return t


def _append(dy: Tensor, t: Tensor, packed: Tensor, absmax: Tensor, lora_A: Tensor) -> Tensor:
    """``[dy | t | 0] @ [W; A; 0]``."""
    N, (ranks, K) = dy.shape[1], lora_A.shape
    weight = torch.empty(N + PAD, K, dtype=dy.dtype, device=dy.device)
    dequantize_tiles_into(weight[:N], packed, absmax)
    weight[N : N + ranks].copy_(lora_A)
    weight[N + ranks :].zero_()
    return widen(dy, t) @ weight
