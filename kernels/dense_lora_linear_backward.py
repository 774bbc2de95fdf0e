"""Gradients of ``dense_lora_linear``: of the input through the frozen weight, and of the adapter."""

from torch import Tensor

from tli_engine.kernels.lora_products import down_dx, gradients


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
    dy = dy.contiguous()

    def dx_of(t: Tensor) -> Tensor:
        # cuBLAS adds to the update under its own arithmetic
        return down_dx(t, lora_A, seed, dropout).addmm_(dy, weight)

    adapter = (lora_A, lora_B, seed, sizes, scaling, dropout)
    return gradients(dy, x, s, *adapter, dx_of if needs_dx else None, needs_lora)
