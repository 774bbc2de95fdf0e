"""``tli_engine::mixed_adamw_``: schema, shape rules and backends; it has no gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tli_engine import backends
from tli_engine.ops.counter_dropout import check_seed
from tli_engine.ops.flat_adamw import check_numbers
from tli_engine.reference.mixed_adamw import adamw_step_, round_at_random_
from tli_engine.reference.mixed_adamw import mixed_adamw as _reference

__all__ = ["adamw_step_", "mixed_adamw_", "round_at_random_"]

_OP = "tli_engine::mixed_adamw_"
_DTYPES = (torch.bfloat16, torch.float16)

torch.library.define(
    _OP,
    "(Tensor(a!) parameter, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
    "Tensor(d!)? master, Tensor? seed, int step, float rate, float beta1, float beta2, float eps, "
    "float weight_decay) -> ()",
)


@torch.library.register_fake(_OP)
def _fake(*_: Any) -> None:
    return None


torch.library.impl(_OP, "CPU")(_reference)


@torch.library.impl(_OP, "CUDA")
def _cuda(*args: Any) -> None:
    backends.resolve("mixed_adamw")(*args)


def mixed_adamw_(
    parameter: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, step: int, rate: float,
    master: Tensor | None = None, seed: Tensor | None = None, beta1: float = 0.9,
    beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.01,
) -> None:  # fmt: skip
    r"""Take a step of AdamW on a 16-bit tensor, in place, in fp32 arithmetic and one pass over memory.

    .. math:: m &\leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
              p &\leftarrow (1 - \eta \lambda) p - \eta \frac{m / (1 - \beta_1^t)}
              {\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    With a ``master`` copy that is :math:`p`, and ``parameter`` gets it rounded. Without one all three
    are bf16, and rounded up or down with the probability of their distance, by random numbers that are
    functions of ``seed`` and of the place in the tensor.
    All tensors are contiguous, but for ``grad``, and on one device.

    Args:
        parameter: bf16, or fp16 with a master copy, any shape; updated.
        grad: Gradient, of ``parameter``'s shape and dtype.
        exp_avg: Running mean :math:`m`, of its shape, fp32 with a master copy, else its dtype; updated.
        exp_avg_sq: Running mean :math:`v` of the square, as ``exp_avg``; updated.
        step: Number :math:`t` of this step, from 1.
        rate: Learning rate :math:`\eta`, not negative.
        master: Copy in fp32, of its shape; updated. None: rounded at random.
        seed: One int64, of this step and tensor; needed without a master copy.
        beta1: Decay of ``exp_avg``, in [0, 1).
        beta2: Decay of ``exp_avg_sq``, in [0, 1).
        eps: Positive.
        weight_decay: :math:`\lambda`, not negative.

    Raises:
        ValueError: A shape, dtype, device or number is not as above.

    Source: Loshchilov and Hutter 2019; Gupta et al. 2015; Zamirai et al. 2020.
    """
    _check_tensors(parameter, grad, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}, master, seed)
    if step < 1 or not rate >= 0:
        raise ValueError(f"step must be positive and rate not negative, got {step} and {rate}")
    check_numbers(*(numbers := (beta1, beta2, eps, weight_decay)), max_grad_norm=1.0)
    op: Callable[..., None] = torch.ops.tli_engine.mixed_adamw_.default
    op(parameter, grad, exp_avg, exp_avg_sq, master, seed, step, rate, *numbers)


def _check_tensors(
    parameter: Tensor,
    grad: Tensor,
    statistics: dict[str, Tensor],
    master: Tensor | None,
    seed: Tensor | None,
) -> None:
    if parameter.dtype not in _DTYPES:
        raise ValueError(f"parameter must be bf16 or fp16, got {parameter.dtype}")
    if master is None and parameter.dtype != torch.bfloat16:
        raise ValueError(f"without a master copy parameter must be bf16, got {parameter.dtype}")
    held = parameter.dtype if master is None else torch.float32
    others = statistics | ({} if master is None else {"master": master})
    _check("parameter", parameter, parameter, parameter.dtype)
    _check("grad", grad, parameter, parameter.dtype, contiguous=False)
    for name, tensor in others.items():
        _check(name, tensor, parameter, held)
    if seed is not None:
        check_seed(seed, parameter.device)
    elif master is None:
        raise ValueError("without a master copy, rounding takes a seed")


def _check(
    name: str, tensor: Tensor, like: Tensor, dtype: torch.dtype, contiguous: bool = True
) -> None:
    if tensor.shape != like.shape or tensor.dtype != dtype or tensor.device != like.device:
        raise ValueError(
            f"{name} must be {dtype} {list(like.shape)} on {like.device}, got {tensor.dtype} "
            f"{list(tensor.shape)} on {tensor.device}"
        )
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {list(tensor.stride())}")
