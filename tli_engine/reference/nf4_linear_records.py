"""Product with an NF4 weight stored as records, and its LoRA update, in plain PyTorch."""

from collections.abc import Sequence

from torch import Tensor

from tli_engine.reference.nf4_linear import nf4_linear
from tli_engine.reference.nf4_lora_linear import nf4_lora_linear
from tli_engine.reference.nf4_records import from_records


def nf4_linear_records(
    x: Tensor,
    records: Tensor,
    transposed: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    seed: Tensor | None,
    sizes: Sequence[int],
    scaling: float,
    dropout: float,
    N: int,
    fast: bool,
) -> tuple[Tensor, Tensor]:
    """Return ``(y, s)``, ``s`` the scaled ``x @ A.T`` or empty without an adapter."""
    packed, absmax = from_records(records, N, x.shape[1], False)
    if lora_A is None or lora_B is None:
        y = nf4_linear(x, packed, absmax, bias, N, 64, False, fast)
        return y, x.new_empty(x.shape[0], 0)
    adapter = (lora_A, lora_B, seed, sizes, scaling, dropout)
    return nf4_lora_linear(x, packed, absmax, bias, *adapter, 64, False, fast)
