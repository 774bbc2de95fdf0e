"""Modules over the ops: linear layers whose frozen weight is NF4."""

from typing import Any

import torch
from torch import Tensor, nn

from tli_engine.nf4 import NF4Weight


class _FrozenLinear(torch.autograd.Function):
    """``x @ W.T`` with a weight that is decoded when needed, and not kept for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: "NF4Linear") -> Tensor:
        ctx.module = module
        return x @ module.weight.dequantize(x.dtype).T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ ctx.module.weight.dequantize(dy.dtype), None


class NF4Linear(nn.Module):
    """A frozen linear layer with its weight in NF4, decoded on the fly, forward and backward.

    Attributes:
        weight: The weight, bitsandbytes' own bytes.
        bias: ``[N]`` in the model's dtype, or ``None``.
    """

    bias: Tensor | None

    def __init__(self, weight: NF4Weight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_buffer("bias", bias)

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.weight.device

    def forward(self, x: Tensor) -> Tensor:
        """Return the projection of ``x``, ``[…, K]`` to ``[…, N]``, in ``x``'s dtype."""
        y: Tensor = _FrozenLinear.apply(x, self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}"
