"""AdamW over one flat buffer after clipping the gradient's norm, in plain PyTorch."""

import torch
from torch import Tensor


def flat_adamw(
    parameters: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    state: Tensor,
    schedule: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_grad_norm: float,
    shadow: Tensor | None = None,
) -> Tensor:
    """Update in place; return the metrics; see :func:`tli_engine.ops.flat_adamw.flat_adamw_`."""
    norm = torch.linalg.vector_norm(grad)
    finite = norm.isfinite()
    # not by indexing, which would wait for a device's number
    lr = schedule.index_select(0, state[:1].clamp(max=schedule.shape[0] - 1))[0]
    step, rate = (state[0] + 1).double(), lr.double()
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    clipped = grad * (max_grad_norm / (norm + 1e-6)).clamp(max=1)
    new_avg = exp_avg.lerp(clipped, 1 - beta1)
    new_sq = (exp_avg_sq * beta2).addcmul_(clipped, clipped, value=1 - beta2)
    update = new_avg / (new_sq.sqrt() / correction2.sqrt() + eps)
    new = parameters * (1 - rate * weight_decay) - update * (rate / correction1)
    for tensor, value in ((exp_avg, new_avg), (exp_avg_sq, new_sq), (parameters, new)):
        tensor.copy_(torch.where(finite, value, tensor))
    if shadow is not None:
        shadow.copy_(torch.where(finite, new, shadow))
    state += torch.stack([finite, ~finite])
    return torch.stack([norm, lr.to(norm.dtype), (~finite).to(norm.dtype)])
