"""Product with a dense weight and its LoRA update, in plain PyTorch.

Both are added before anything is rounded to 16 bits: a small update would be lost afterwards.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tli_engine.reference.counter_dropout import counter_dropout


def dense_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    sizes: Sequence[int],
    scaling: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Return ``(y, s)``, ``s`` the scaled ``x @ A.T``; see :func:`tli_engine.ops.dense_lora_linear`."""
    dropped = x if seed is None else counter_dropout(x, seed, dropout)
    s = dropped @ (lora_A * scaling).to(x.dtype).T
    wide = torch.promote_types(x.dtype, torch.float32)
    y = torch.nn.functional.linear(
        x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)
    )
    parts = torch.split(lora_B.to(x.dtype).to(wide), list(sizes))
    groups = zip(torch.split(s.to(wide), lora_B.shape[1], 1), parts, strict=True)
    return (y + torch.cat([part @ b.T for part, b in groups], 1)).to(x.dtype), s
