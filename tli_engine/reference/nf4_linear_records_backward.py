"""Gradients of ``nf4_linear_records``, in plain PyTorch."""

from collections.abc import Sequence

from torch import Tensor

from tli_engine.reference.nf4_linear_dx import nf4_linear_dx
from tli_engine.reference.nf4_lora_linear_backward import nf4_lora_linear_backward
from tli_engine.reference.nf4_records import from_records


def nf4_linear_records_backward(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor,
    records: Tensor,
    transposed: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    seed: Tensor | None,
    sizes: Sequence[int],
    scaling: float,
    dropout: float,
    K: int,
    fast: bool,
    needs_dx: bool,
    needs_lora: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(dx, dA, dB)``; those not needed are empty."""
    stored = from_records(records, dy.shape[1], K, False)
    if lora_A is None or lora_B is None or x is None:
        dx = nf4_linear_dx(dy, *stored, K, 64, False, fast) if needs_dx else dy.new_empty(0)
        return dx, dy.new_empty(0), dy.new_empty(0)
    adapter = (*stored, lora_A, lora_B, seed, sizes, scaling, dropout)
    return nf4_lora_linear_backward(dy, x, s, *adapter, 64, False, fast, needs_dx, needs_lora)
