"""Gradient of :mod:`tli_engine.reference.swiglu`, the activation computed anew."""

import math

import torch
from torch import Tensor


def swiglu_backward(dout: Tensor, gate_up: Tensor, act: str) -> Tensor:
    """Return the gradient of ``gate_up``, ``[T, 2 I]``.

    Both activations are x times a sigmoid: of x itself, or of a cubic for the tanh form of GELU. It is
    computed in fp32, or fp64, and rounded once.
    """
    acc = torch.promote_types(gate_up.dtype, torch.float32)
    gate, up = gate_up.to(acc).chunk(2, dim=1)
    dout = dout.to(acc)
    if act == "silu":
        inner, slope = gate, torch.ones_like(gate)
    else:
        factor = math.sqrt(8 / math.pi)
        inner = factor * (gate + 0.044715 * gate**3)
        slope = factor * (1 + 3 * 0.044715 * gate**2)
    share = inner.sigmoid()
    # not 1 - share, which would cancel
    rest = (-inner).sigmoid()
    dgate = dout * up * (share + gate * share * rest * slope)
    return torch.cat([dgate, dout * (gate * share)], dim=1).to(gate_up.dtype)
