"""A residual added, then the root-mean-square norm of the sum, in plain PyTorch."""

import torch
from torch import Tensor


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, plus_one: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the scaled norm, the sum and each row's reciprocal root mean square.

    The arguments are those of :func:`tli_engine.ops.add_rms_norm`. The sum is empty where there is no
    residual, the reciprocals are ``[T]`` in fp32, or fp64 for fp64 input.
    """
    h = x if residual is None else x + residual
    wide = h.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normed = wide * rstd
    if plus_one:
        y = (normed * (1.0 + weight.to(wide.dtype))).to(x.dtype)
    else:
        y = weight * normed.to(x.dtype)
    total = x.new_empty(0) if residual is None else h.contiguous()
    return y.contiguous(), total, rstd[:, 0].contiguous()
