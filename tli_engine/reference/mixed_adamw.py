"""AdamW of a 16-bit tensor, with an fp32 master copy or rounded at random, in plain PyTorch."""

import math

import torch
from torch import Tensor

from tli_engine.reference.philox import philox


def mixed_adamw(
    parameter: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    master: Tensor | None,
    seed: Tensor | None,
    step: int,
    rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Update in place; see :func:`tli_engine.ops.mixed_adamw.mixed_adamw_`."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    held = parameter if master is None else master
    value, mean, square = (t.to(dtype, copy=True) for t in (held, exp_avg, exp_avg_sq))
    numbers = (beta1, beta2, eps, weight_decay)
    adamw_step_(value, grad.to(dtype), mean, square, step, rate, *numbers)
    if master is not None:
        for target, exact in ((master, value), (exp_avg, mean), (exp_avg_sq, square)):
            target.copy_(exact)
        parameter.copy_(value)
        return
    assert seed is not None
    number = torch.arange(parameter.numel(), device=parameter.device).view(parameter.shape)
    random = philox(seed.view(()), number & 0xFFFFFFFF, number >> 32)
    for target, exact, bits in zip(
        (parameter, exp_avg, exp_avg_sq), (value, mean, square), random[:3], strict=True
    ):
        round_at_random_(target, exact, bits & 0xFFFF)


def adamw_step_(
    value: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    step: int,
    rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Update a tensor and its two means in their own dtype, that of the gradient."""
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    scale = square.sqrt().div_(math.sqrt(1 - beta2**step)).add_(eps)
    value.mul_(1 - rate * weight_decay)
    value.addcdiv_(mean, scale, value=-rate / (1 - beta1**step))


def round_at_random_(target: Tensor, exact: Tensor, bits: Tensor) -> None:
    """Write fp32 numbers to a tensor: up or down at random where it is bf16, else to nearest.

    Args:
        target: Overwritten.
        exact: Of ``target``'s shape, fp32 where ``target`` is bf16; overwritten too.
        bits: Uniform in [0, 65536), integers of ``target``'s shape.
    """
    if target.dtype == torch.bfloat16:
        # bf16 is the upper half: a carry out of the lower one rounds up
        whole, nan = exact.view(torch.int32), exact.isnan()
        whole.add_(bits.to(torch.int32)).bitwise_and_(-(1 << 16))
        # it may be all ones, and a carry would make it -0
        exact.masked_fill_(nan, math.nan)
    target.copy_(exact)
