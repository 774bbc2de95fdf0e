"""Gradients of ``nf4_linear_records``: of the input through the frozen weight, and of the adapter."""

from torch import Tensor

from tli_engine.kernels.lora_products import down_backward, up_backward
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
    dx, dA, dB = (
        like.new_empty(0)
        for like in (dy, dy if lora_A is None else lora_A, dy if lora_B is None else lora_B)
    )
    if dy.shape[0] == 0:
        dx = dy.new_empty((0, K) if needs_dx else (0,))
        if needs_lora and lora_A is not None and lora_B is not None:
            dA, dB = lora_A.new_zeros(lora_A.shape), lora_B.new_zeros(lora_B.shape)
        return dx, dA, dB
    if lora_A is None or lora_B is None:
        return product_dx(dy, records, transposed, K, fast, None) if needs_dx else dx, dA, dB
    t, dB = up_backward(dy, lora_B, s, sizes, scaling, needs_lora)
    if needs_dx:
        dx = product_dx(dy, records, transposed, K, fast, (t, lora_A, seed, dropout))
    if needs_lora and x is not None:
        dA = down_backward(x.contiguous(), t, len(sizes), seed, dropout, lora_A.dtype)
    return dx, dA, dB
