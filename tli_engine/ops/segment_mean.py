"""``tli_engine::segment_mean`` and its gradient: schemas, shape rules, backends."""

from typing import Any

import torch
from torch import Tensor

from tli_engine import backends
from tli_engine.reference.segment_mean import segment_mean as _reference
from tli_engine.reference.segment_mean_backward import segment_mean_backward as _reference_backward

_OP = "tli_engine::segment_mean"
_BACKWARD = "tli_engine::segment_mean_backward"

torch.library.define(_OP, "(Tensor x, Tensor weight, Tensor offsets) -> Tensor")
torch.library.define(
    _BACKWARD, "(Tensor dmean, Tensor weight, Tensor offsets, ScalarType dtype) -> Tensor"
)


@torch.library.register_fake(_OP)
def _fake(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    acc = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(offsets.shape[0] - 1, x.shape[1], dtype=acc)


@torch.library.register_fake(_BACKWARD)
def _fake_backward(dmean: Tensor, weight: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    return dmean.new_empty(weight.shape[0], dmean.shape[1], dtype=dtype)


torch.library.impl(_OP, "CPU")(_reference)
torch.library.impl(_BACKWARD, "CPU")(_reference_backward)


@torch.library.impl(_OP, "CUDA")
def _cuda(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return backends.resolve("segment_mean")(x, weight, offsets)  # type: ignore[no-any-return]


@torch.library.impl(_BACKWARD, "CUDA")
def _cuda_backward(dmean: Tensor, weight: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    backward = backends.resolve("segment_mean_backward")
    return backward(dmean, weight, offsets, dtype)  # type: ignore[no-any-return]


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    x, weight, offsets = inputs
    ctx.save_for_backward(weight, offsets)
    ctx.dtype = x.dtype


def _backward(ctx: Any, dmean: Tensor) -> tuple[Tensor | None, None, None]:
    if not ctx.needs_input_grad[0]:
        return None, None, None
    op = torch.ops.tli_engine.segment_mean_backward.default
    return op(dmean, *ctx.saved_tensors, ctx.dtype), None, None


def _setup_context_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])


def _backward_backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, None, None, None]:
    # the mean is linear in the rows: the gradient of its gradient is the mean again
    mean = torch.ops.tli_engine.segment_mean.default(ddx, *ctx.saved_tensors)
    return mean, None, None, None


torch.library.register_autograd(_OP, _backward, setup_context=_setup_context)
torch.library.register_autograd(
    _BACKWARD, _backward_backward, setup_context=_setup_context_backward
)


def segment_mean(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    r"""Weighted mean of the rows of each segment of a pack.

    .. math:: y_s = \frac{\sum_{t=o_s}^{o_{s+1}-1} w_t\, x_t}{\sum_{t=o_s}^{o_{s+1}-1} w_t}

    Args:
        x: Packed rows, ``[T, D]``; fp16, bf16, fp32 or fp64.
        weight: Weight of each row, ``[T]``, floating point, not negative; zero leaves a row out.
        offsets: First row of each segment, then the last one's end; ``[S + 1]``, int64, ascending.
            Rows from there on, which fill a pack up, are in no mean.

    Returns:
        Means, ``[S, D]``, fp32 (fp64 for fp64 rows); zeros for a segment of no weight.

    Raises:
        ValueError: A shape or dtype is not as above.
    """
    if x.ndim != 2 or weight.shape != x.shape[:1]:
        raise ValueError(f"x must be [T, D] and weight [T], got {x.shape} and {weight.shape}")
    if not weight.is_floating_point():
        raise ValueError(f"weight must be floating point, got {weight.dtype}")
    if offsets.ndim != 1 or offsets.dtype != torch.int64 or offsets.shape[0] < 1:
        raise ValueError(f"offsets must be int64 [S + 1], got {offsets.dtype} {offsets.shape}")
    mean: Tensor = torch.ops.tli_engine.segment_mean.default(x, weight, offsets)
    return mean
