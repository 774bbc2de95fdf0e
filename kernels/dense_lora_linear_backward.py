"""Gradients of ``dense_lora_linear``: of the input through the frozen weight, and of the adapter."""

from torch import Tensor

from tli_engine.kernels.lora_products import down_backward, down_dx, up_backward


def dense_lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    sizes: list[int],
    scaling: float,
    dropout: float,
    needs_dx: bool,
    needs_lora: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch; arguments are those of ``tli_engine::dense_lora_linear_backward``."""
    dy, x = dy.contiguous(), x.contiguous()
    if dy.shape[0] == 0:
        return (
            dy.new_empty((0, x.shape[1]) if needs_dx else (0,)),
            lora_A.new_zeros(lora_A.shape if needs_lora else (0,)),
            lora_B.new_zeros(lora_B.shape if needs_lora else (0,)),
        )
    t, dB = up_backward(dy, lora_B, s, sizes, scaling, needs_lora)
    dx, dA = dy.new_empty(0), lora_A.new_empty(0)
    if needs_dx:
        # cuBLAS adds to the update under its own arithmetic
        dx = down_dx(t, lora_A, seed, dropout).addmm_(dy, weight)
    if needs_lora:
        dA = down_backward(x, t, len(sizes), seed, dropout, lora_A.dtype)
    return dx, dA, dB
