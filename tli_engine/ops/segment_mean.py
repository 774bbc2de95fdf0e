"""``tli_engine::segment_mean``: schema, shape rules, backends and gradient."""

from typing import Any

import torch
from torch import Tensor

from tli_engine import backends
from tli_engine.reference.segment_mean import segment_mean as _reference

_OP = "tli_engine::segment_mean"

torch.library.define(_OP, "(Tensor x, Tensor weight, Tensor offsets) -> Tensor")


@torch.library.register_fake(_OP)
def _fake(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    acc = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(offsets.shape[0] - 1, x.shape[1], dtype=acc)


torch.library.impl(_OP, "CPU")(_reference)


@torch.library.impl(_OP, "CUDA")
def _cuda(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return backends.resolve("segment_mean")(x, weight, offsets)  # type: ignore[no-any-return]


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    x, weight, offsets = inputs
    ctx.save_for_backward(weight, offsets)
    ctx.dtype = x.dtype


def _backward(ctx: Any, dmean: Tensor) -> tuple[Tensor | None, None, None]:
    if not ctx.needs_input_grad[0]:
        return None, None, None
    weight, offsets = ctx.saved_tensors
    weight = weight.to(dmean.dtype)
    rows = torch.arange(weight.shape[0], device=weight.device)
    # offsets are sorted: the segment of a row is the last offset not beyond it
    segment = torch.searchsorted(offsets, rows, right=True) - 1
    total = torch.zeros_like(dmean[:, 0]).index_add(0, segment, weight)
    share = weight / torch.where(total == 0, 1, total)[segment]
    return (dmean[segment] * share[:, None]).to(ctx.dtype), None, None


torch.library.register_autograd(_OP, _backward, setup_context=_setup_context)


def segment_mean(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    r"""Weighted mean of the rows of each segment of a pack.

    .. math:: y_s = \frac{\sum_{t=o_s}^{o_{s+1}-1} w_t\, x_t}{\sum_{t=o_s}^{o_{s+1}-1} w_t}

    Args:
        x: Packed rows, ``[T, D]``; fp16, bf16, fp32 or fp64.
        weight: Weight of each row, ``[T]``, floating point, not negative; zero leaves a row out.
        offsets: First row of each segment, then ``T``; ``[S + 1]``, int64, ascending.

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
