"""Product with an NF4 weight and its LoRA update, in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tli_engine.reference.counter_dropout import counter_dropout
from tli_engine.reference.nf4_linear import nf4_linear


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
    y = nf4_linear(x, packed, absmax, bias, lora_B.shape[0], block_size, tiled, fast)
    dropped = x if seed is None else counter_dropout(x, seed, dropout)
    s = dropped @ (lora_A * scaling).to(x.dtype).T
    groups = zip(
        torch.split(s, lora_B.shape[1], 1),
        torch.split(lora_B.to(x.dtype), list(sizes)),
        strict=True,
    )
    return y + torch.cat([part @ b.T for part, b in groups], 1), s
