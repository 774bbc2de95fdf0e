"""``tli_engine::flat_adamw_``: schema, shape rules and backends; it has no gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tli_engine import backends
from tli_engine.reference.flat_adamw import flat_adamw as _reference

_OP = "tli_engine::flat_adamw_"

torch.library.define(
    _OP,
    "(Tensor(a!) parameters, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
    "Tensor(d!) state, Tensor schedule, float beta1, float beta2, float eps, float weight_decay, "
    "float max_grad_norm, Tensor(e!)? shadow=None) -> Tensor",
)


@torch.library.register_fake(_OP)
def _fake(parameters: Tensor, grad: Tensor, *_: Any, **__: Any) -> Tensor:
    return grad.new_empty(3)


torch.library.impl(_OP, "CPU")(_reference)


@torch.library.impl(_OP, "CUDA")
def _cuda(*args: Any, **kwargs: Any) -> Tensor:
    return backends.resolve("flat_adamw")(*args, **kwargs)  # type: ignore[no-any-return]


def flat_adamw_(
    parameters: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, state: Tensor,
    schedule: Tensor, *, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8,
    weight_decay: float = 0.01, max_grad_norm: float = float("inf"), shadow: Tensor | None = None,
) -> Tensor:  # fmt: skip
    r"""Clip the gradient's norm and take a step of AdamW, in place, waiting for no device.

    .. math:: g' &= g \min(1, c / (\lVert g \rVert + 10^{-6})) \\
              m &\leftarrow \beta_1 m + (1 - \beta_1) g', \quad v \leftarrow \beta_2 v + (1 - \beta_2) g'^2 \\
              p &\leftarrow (1 - \eta_t \lambda) p - \eta_t \frac{m / (1 - \beta_1^{t+1})}
              {\sqrt{v / (1 - \beta_2^{t+1})} + \epsilon}

    with :math:`t` steps done before. If the norm, or its square, is not finite the step is skipped:
    only the count of skips changes. All buffers are contiguous, on one device.

    Args:
        parameters: ``[P]``, fp32 or, on a CPU, fp64; updated.
        grad: Gradient, of ``parameters``' shape and dtype as the two means.
        exp_avg: Running mean :math:`m` of the gradient; updated.
        exp_avg_sq: Running mean :math:`v` of its square; updated.
        state: Steps done and steps skipped, ``[2]``, int32 or int64; updated.
        schedule: Rate :math:`\eta_t` of each step, ``[total_steps]``, fp32; the last one ever after.
        beta1: Decay of ``exp_avg``, in [0, 1).
        beta2: Decay of ``exp_avg_sq``, in [0, 1).
        eps: Positive: where all is zero, as in padding, it stays zero.
        weight_decay: :math:`\lambda`, not negative.
        max_grad_norm: Largest norm :math:`c`, positive; infinity for any.
        shadow: ``[P]``, bf16 or fp16; gets a copy of the parameters, or ``None``.

    Returns:
        Norm before clipping, learning rate, and 1 if the step was skipped, else 0; ``[3]``.

    Raises:
        ValueError: A shape, dtype, device or number is not as above.

    Source: Loshchilov and Hutter 2019; ``torch.optim.AdamW`` after ``clip_grad_norm_``.
    """
    _check_buffers(parameters, {"grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq})
    _check_tables(parameters, state, schedule, shadow)
    check_numbers(*(numbers := (beta1, beta2, eps, weight_decay, max_grad_norm)))
    op: Callable[..., Tensor] = torch.ops.tli_engine.flat_adamw_.default
    return op(parameters, grad, exp_avg, exp_avg_sq, state, schedule, *numbers, shadow)


def check_numbers(
    beta1: float, beta2: float, eps: float, weight_decay: float, max_grad_norm: float
) -> None:
    """Raise ``ValueError`` for a number that :func:`flat_adamw_` does not take."""
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name} must be in [0, 1), got {beta}")
    for name, number in (("eps", eps), ("max_grad_norm", max_grad_norm)):
        if not number > 0:
            raise ValueError(f"{name} must be positive, got {number}")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}")


def _check_buffers(parameters: Tensor, others: dict[str, Tensor]) -> None:
    dtypes = {"cpu": (torch.float32, torch.float64)}.get(parameters.device.type, (torch.float32,))
    if parameters.ndim != 1 or parameters.dtype not in dtypes:
        raise ValueError(
            f"parameters must be fp32 [P], or fp64 on a CPU, got {parameters.dtype} "
            f"{list(parameters.shape)} on {parameters.device}"
        )
    _check_place("parameters", parameters, parameters.device)
    for name, tensor in others.items():
        if tensor.shape != parameters.shape or tensor.dtype != parameters.dtype:
            raise ValueError(
                f"{name} must be {parameters.dtype} {list(parameters.shape)} as parameters, got "
                f"{tensor.dtype} {list(tensor.shape)}"
            )
        _check_place(name, tensor, parameters.device)


def _check_tables(
    parameters: Tensor, state: Tensor, schedule: Tensor, shadow: Tensor | None
) -> None:
    if state.dtype not in (torch.int32, torch.int64) or state.shape != (2,):
        raise ValueError(f"state must be int32 or int64 [2], got {state.dtype} {list(state.shape)}")
    if schedule.dtype != torch.float32 or schedule.ndim != 1 or schedule.numel() == 0:
        raise ValueError(
            f"schedule must be fp32 [total_steps], got {schedule.dtype} {list(schedule.shape)}"
        )
    tensors = {"state": state, "schedule": schedule}
    if shadow is not None:
        if shadow.dtype not in (torch.bfloat16, torch.float16) or shadow.shape != parameters.shape:
            raise ValueError(
                f"shadow must be bf16 or fp16 {list(parameters.shape)}, got {shadow.dtype} "
                f"{list(shadow.shape)}"
            )
        tensors["shadow"] = shadow
    for name, tensor in tensors.items():
        _check_place(name, tensor, parameters.device)


def _check_place(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous on {device} as parameters, got strides "
            f"{list(tensor.stride())} on {tensor.device}"
        )
