"""Product with an NF4 weight and its LoRA update, in plain PyTorch."""

from collections.abc import Sequence

from torch import Tensor

from tli_engine.reference.dense_lora_linear import dense_lora_linear
from tli_engine.reference.nf4_linear import decoded


def nf4_lora_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    sizes: Sequence[int],
    scaling: float,
    dropout: float,
    block_size: int,
    tiled: bool,
    fast: bool,
) -> tuple[Tensor, Tensor]:
    """Return ``(y, s)``, ``s`` the scaled ``x @ A.T``; see :func:`tli_engine.ops.nf4_lora_linear`."""
    weight = decoded(packed, absmax, lora_B.shape[0], x.shape[1], block_size, tiled, x.dtype)
    return dense_lora_linear(x, weight, bias, lora_A, lora_B, seed, sizes, scaling, dropout)
