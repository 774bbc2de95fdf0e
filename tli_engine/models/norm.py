"""An RMSNorm module's weights on the engine's op, with one gradient where a block's input forks."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tli_engine.ops import add_rms_norm


class Norm:
    """One RMSNorm, whose weight is read when it runs: it may have been replaced."""

    def __init__(self, module: Any) -> None:
        self._module = module
        # Gemma's norms call it eps, and scale by 1 + weight
        self._plus_one = not hasattr(module, "variance_epsilon")
        self._eps: float = module.eps if self._plus_one else module.variance_epsilon

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the norm of ``x + residual``, and the sum."""
        return add_rms_norm(x, residual, self._module.weight, self._eps, plus_one=self._plus_one)

    def fork(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return the norm of ``h``, and ``h`` for the way around; their gradients are added in fp32.

        As bit for bit they are where the sum ``h`` is made by the norm itself.
        """
        arguments = (h, self._module.weight, self._eps, self._plus_one)
        y, same = _Fork.apply(*arguments)  # type: ignore[no-untyped-call]
        return y, same

    def heads(self, x: Tensor) -> Tensor:
        """Norm of each head, ``[T, H, D]``."""
        return self(x.reshape(-1, x.shape[-1]))[0].view(x.shape)


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, eps: float, plus_one: bool
    ) -> tuple[Tensor, Tensor]:
        op = torch.ops.tli_engine.add_rms_norm.default
        y, _, rstd = op(h, None, weight, eps, plus_one)
        ctx.save_for_backward(h, rstd, weight)
        ctx.plus_one = plus_one
        ctx.set_materialize_grads(False)
        # h itself would come out as a view, whose hooks FSDP2 does not trust
        return y, h.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        needs_h, needs_weight = ctx.needs_input_grad[:2]
        if dy is None:
            return dh, None, None, None
        op = torch.ops.tli_engine.add_rms_norm_backward.default
        dx, dweight = op(dy, dh, *ctx.saved_tensors, ctx.plus_one, needs_weight)
        return dx if needs_h else None, dweight if needs_weight else None, None, None
