"""AdamW on 16-bit tensors alone: what is lost in rounding is lost at random, so nothing in the mean."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# elements updated at a time: fp32 copies of no more than these are held
CHUNK = 1 << 26
_BETAS, _EPS = (0.9, 0.999), 1e-8


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW whose parameters and statistics stay in the parameters' dtype.

    Each is computed in fp32 and, in bf16, rounded up or down with the probability of its distance:
    an update smaller than a rounding step still counts. Random numbers come from torch's generator
    of the device. Other dtypes are rounded to nearest.

    Source: Gupta et al. 2015; Zamirai et al. 2020, "Revisiting BFloat16 Training".
    """

    def __init__(self, params: Iterable[dict[str, Any]]) -> None:
        super().__init__(params, {"lr": 0.0, "weight_decay": 0.01})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group["lr"], group["weight_decay"])

    def _update(self, parameter: Tensor, rate: float, decay: float) -> None:
        state = self.state[parameter]
        if not state:
            # a tensor on the CPU, as torch's own AdamW keeps it
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        t = float(state["step"])
        beta1, beta2 = _BETAS
        correction1, correction2 = 1 - beta1**t, 1 - beta2**t
        assert parameter.grad is not None
        tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        for p, g, m, v in zip(*(x.view(-1).split(CHUNK) for x in tensors), strict=True):
            gradient = g.float()
            mean = m.float().lerp_(gradient, 1 - beta1)
            square = v.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            scale = square.sqrt().div_(math.sqrt(correction2)).add_(_EPS)
            value = p.float().mul_(1 - rate * decay)
            value.addcdiv_(mean, scale, value=-rate / correction1)
            for target, exact in ((p, value), (m, mean), (v, square)):
                round_at_random_(target, exact)


def round_at_random_(target: Tensor, exact: Tensor) -> None:
    """Write fp32 numbers to a tensor: up or down at random where it is bf16, else to nearest.

    Args:
        target: ``[N]``; overwritten.
        exact: ``[N]``, fp32, finite; overwritten too.
    """
    if target.dtype != torch.bfloat16:
        target.copy_(exact)
        return
    bits = exact.view(torch.int32)
    # bf16 is the upper half: a carry out of the lower one rounds up
    bits.add_(torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device))
    bits.bitwise_and_(-(1 << 16))
    target.copy_(exact)
