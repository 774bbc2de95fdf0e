"""Gradients of ``nf4_lora_linear``: of the input through the frozen weight, and of the adapter."""

from torch import Tensor

from tli_engine.kernels.keep_decoded import for_backward
from tli_engine.kernels.lora_down import is_narrow
from tli_engine.kernels.lora_products import down_dx, gradients
from tli_engine.kernels.nf4_dequantize import dequantize_tiles, dequantize_tiles_into
from tli_engine.kernels.nf4_dispatch import choose_tile
from tli_engine.kernels.nf4_linear_dx import fused_dx
from tli_engine.kernels.widen import appended_gradient, appends_gradient


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
    dy = dy.contiguous()

    def dx_of(t: Tensor) -> Tensor:
        stored = (packed, absmax, block_size, tiled, fast)
        return _dx(dy, t, lora_A, len(sizes), seed, dropout, *stored)

    adapter = (lora_A, lora_B, seed, sizes, scaling, dropout)
    return gradients(dy, x, s, *adapter, dx_of if needs_dx else None, needs_lora)


def _dx(
    dy: Tensor,
    t: Tensor,
    lora_A: Tensor,
    groups: int,
    seed: Tensor | None,
    dropout: float,
    packed: Tensor,
    absmax: Tensor,
    block_size: int,
    tiled: bool,
    fast: bool,
) -> Tensor:
    """``dy @ W + D(t @ A)``."""
    (M, N), (ranks, K) = dy.shape, lora_A.shape
    narrow = is_narrow(dy, groups, ranks // groups)
    tile = choose_tile("dx", dy, M, N, K, block_size, absmax) if narrow else None
    if tile is not None:
        lora = (t, lora_A.contiguous()) if seed is None else None
        dx = fused_dx(dy, packed, absmax, K, tiled, fast, tile, lora)
        return dx if seed is None else down_dx(t, lora_A, seed, dropout, dx)
    if narrow and tiled and appends_gradient(M, N, K, seed):
        return appended_gradient(
            dy, t, lora_A, lambda weight: dequantize_tiles_into(weight, packed, absmax)
        )
    stored = (packed, absmax, N, K, dy.dtype, block_size, tiled)
    weight = for_backward(packed, dy.dtype, lambda: dequantize_tiles(*stored))
    # cuBLAS adds to the update under its own arithmetic
    return down_dx(t, lora_A, seed, dropout).addmm_(dy, weight)
