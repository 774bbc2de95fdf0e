"""Gradients of ``nf4_lora_linear``, in plain PyTorch."""

from collections.abc import Sequence

from torch import Tensor

from tli_engine.reference.dense_lora_linear_backward import dense_lora_linear_backward
from tli_engine.reference.nf4_linear import decoded


def nf4_lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    packed: Tensor,
    absmax: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    sizes: Sequence[int],
    scaling: float,
    dropout: float,
    block_size: int,
    tiled: bool,
    fast: bool,
    needs_dx: bool,
    needs_lora: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(dx, dA, dB)``; those not needed are empty."""
    N, K = lora_B.shape[0], x.shape[1]
    weight = dy.new_empty(0)
    if needs_dx:
        weight = decoded(packed, absmax, N, K, block_size, tiled, dy.dtype)
    adapter = (lora_A, lora_B, seed, sizes, scaling, dropout)
    return dense_lora_linear_backward(dy, x, s, weight, *adapter, needs_dx, needs_lora)
