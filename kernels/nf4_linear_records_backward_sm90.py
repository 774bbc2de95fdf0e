"""Gradients of ``nf4_linear_records``: of the input through the frozen weight, and of the adapter."""

from torch import Tensor

from tli_engine.kernels.lora_products import gradients
from tli_engine.kernels.nf4_linear_records_sm90 import product_dx


def nf4_linear_records_backward(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor,
    records: Tensor,
    transposed: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    seed: Tensor | None,
    sizes: list[int],
    scaling: float,
    dropout: float,
    K: int,
    fast: bool,
    needs_dx: bool,
    needs_lora: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch; arguments are those of ``tli_engine::nf4_linear_records_backward``."""
    dy = dy.contiguous()
    if lora_A is None or lora_B is None or x is None:
        dx = dy.new_empty((0, K) if needs_dx else (0,))
        if needs_dx and dy.shape[0]:
            dx = product_dx(dy, records, transposed, K, fast, None)
        return dx, dy.new_empty(0), dy.new_empty(0)

    def dx_of(t: Tensor) -> Tensor:
        return product_dx(dy, records, transposed, K, fast, (t, lora_A, seed, dropout))

    adapter = (lora_A, lora_B, seed, sizes, scaling, dropout)
    return gradients(dy, x, s, *adapter, dx_of if needs_dx else None, needs_lora)
