"""``tli_engine::add_rms_norm`` and its gradients: schemas, shape rules, backends."""

from typing import Any

import torch
from torch import Tensor

from tli_engine import backends
from tli_engine.ops.nf4_linear import check_dtype
from tli_engine.reference.add_rms_norm import add_rms_norm as _reference
from tli_engine.reference.add_rms_norm_backward import add_rms_norm_backward as _reference_backward

_OP = "tli_engine::add_rms_norm"
_BACKWARD = "tli_engine::add_rms_norm_backward"
# what the registers of one program hold
_WIDEST_ON_GPU = 16384

torch.library.define(
    _OP,
    "(Tensor x, Tensor? residual, Tensor weight, float eps, bool plus_one)"
    " -> (Tensor y, Tensor h, Tensor rstd)",
)
torch.library.define(
    _BACKWARD,
    "(Tensor dy, Tensor? dh, Tensor h, Tensor rstd, Tensor weight, bool plus_one,"
    " bool needs_dweight) -> (Tensor dx, Tensor dweight)",
)


@torch.library.register_fake(_OP)
def _fake(x: Tensor, residual: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    acc = torch.promote_types(x.dtype, torch.float32)
    # an op's output may not be its input: without a residual the sum is left to the caller
    h = x.new_empty(0) if residual is None else x.new_empty(x.shape)
    return x.new_empty(x.shape), h, x.new_empty(x.shape[0], dtype=acc)


@torch.library.register_fake(_BACKWARD)
def _fake_backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    rstd: Tensor,
    weight: Tensor,
    plus_one: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), weight.new_empty(weight.shape if needs_dweight else 0)


torch.library.impl(_OP, "CPU")(_reference)
torch.library.impl(_BACKWARD, "CPU")(_reference_backward)


@torch.library.impl(_OP, "CUDA")
def _cuda(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return backends.resolve("add_rms_norm")(*args)  # type: ignore[no-any-return]


@torch.library.impl(_BACKWARD, "CUDA")
def _cuda_backward(*args: Any) -> tuple[Tensor, Tensor]:
    return backends.resolve("add_rms_norm_backward")(*args)  # type: ignore[no-any-return]


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, residual, weight, _, ctx.plus_one = inputs
    _, h, rstd = output
    # the gradient of a sum that nobody used is None, not zeros to be read
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if residual is None else h, rstd, weight)
    ctx.mark_non_differentiable(*((h, rstd) if residual is None else (rstd,)))


def _backward(
    ctx: Any, dy: Tensor | None, dh: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    needs_x, needs_residual, needs_dweight = ctx.needs_input_grad[:3]
    if dy is None:
        dx, dweight = dh, None
    else:
        op = torch.ops.tli_engine.add_rms_norm_backward.default
        dx, dweight = op(dy, dh, *ctx.saved_tensors, ctx.plus_one, needs_dweight)
    return (
        dx if needs_x else None,
        dx if needs_residual else None,
        dweight if needs_dweight else None,
        None,
        None,
    )


torch.library.register_autograd(_OP, _backward, setup_context=_setup_context)


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    plus_one: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Add a residual, and return the root-mean-square norm of the sum beside the sum.

    .. math:: h_t = x_t + r_t, \qquad
        y_t = w \odot \frac{h_t}{\sqrt{\tfrac{1}{D} \sum_d h_{td}^2 + \varepsilon}}

    It rounds where transformers does. The sum is rounded to ``x``'s dtype, and the norm is that of the
    rounded sum, computed in fp32 (fp64 for fp64). As in Llama, Mistral, Qwen2 and Qwen3 it is rounded
    before it is multiplied by the weight; with ``plus_one``, as in Gemma 3, it is multiplied by
    ``1 + w`` and then rounded. Gradients reach ``x`` and ``residual``, to which they are equal, and
    ``weight`` where it requires one; each is computed in fp32 and rounded once. Nothing is copied while
    the last dimensions are contiguous.

    Args:
        x: What a block adds, or hidden states, ``[T, D]``; bf16, fp16 or fp32, on the CPU fp64 too.
            D is at most 16384 on a GPU.
        residual: Hidden states that ``x`` is added to, of ``x``'s shape and dtype; None for none.
        weight: Scale of each dimension, ``[D]``, of ``x``'s dtype.
        eps: Added to the mean square.
        plus_one: Whether the scale is ``1 + weight``.

    Returns:
        The norm and the sum, ``[T, D]`` in ``x``'s dtype, contiguous; the sum is ``x`` itself without a
        residual. A row with a value that is not finite has no effect on others.

    Raises:
        ValueError: A shape, dtype or device is not as above.

    Source: Zhang and Sennrich 2019 (RMSNorm), eq. 4.
    """
    _check(x, residual, weight)
    op = torch.ops.tli_engine.add_rms_norm.default
    y, h, _ = op(x, residual, weight, eps, plus_one)
    return y, x if residual is None else h


def _check(x: Tensor, residual: Tensor | None, weight: Tensor) -> None:
    check_dtype(x)
    if x.ndim != 2 or x.shape[1] < 1:
        raise ValueError(f"x must be [T, D], got {list(x.shape)}")
    D = x.shape[1]
    if x.is_cuda and D > _WIDEST_ON_GPU:
        raise ValueError(f"on a GPU x must have a D of at most {_WIDEST_ON_GPU}, got {D}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must be {list(x.shape)} as x, got {list(residual.shape)}")
    if weight.shape != (D,):
        raise ValueError(f"weight must be [{D}], got {list(weight.shape)}")
    for name, other in (("residual", residual), ("weight", weight)):
        if other is not None and other.dtype != x.dtype:
            raise ValueError(f"{name} must be {x.dtype} as x, got {other.dtype}")
        if other is not None and other.device != x.device:
            raise ValueError(f"{name} must be on {x.device} as x, got {other.device}")
