"""``tli_engine::cosine_similarity``: schema, shape rules, backends and gradient."""

from typing import Any

import torch
from torch import Tensor

from tli_engine import backends
from tli_engine.reference.cosine_similarity import cosine_similarity as _reference

_OP = "tli_engine::cosine_similarity"

torch.library.define(_OP, "(Tensor x, Tensor y) -> (Tensor, Tensor, Tensor)")


@torch.library.register_fake(_OP)
def _fake(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    acc = torch.promote_types(x.dtype, torch.float32)
    n, m = x.shape[0], y.shape[0]
    cos = x.new_empty(n, m, dtype=acc)
    return cos, x.new_empty(n, 1, dtype=acc), x.new_empty(m, 1, dtype=acc)


torch.library.impl(_OP, "CPU")(_reference)


@torch.library.impl(_OP, "CUDA")
def _cuda(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return backends.resolve("cosine_similarity")(x, y)  # type: ignore[no-any-return]


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    cos, x_norm, y_norm = output
    ctx.save_for_backward(*inputs, cos, x_norm, y_norm)
    ctx.mark_non_differentiable(x_norm, y_norm)
    # no zeros for the norms, which have no gradient
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dcos: Tensor | None, *_: Any) -> tuple[Tensor | None, Tensor | None]:
    if dcos is None:
        return None, None
    x, y, cos, x_norm, y_norm = ctx.saved_tensors
    x_unit, y_unit = x.to(cos.dtype) / x_norm, y.to(cos.dtype) / y_norm
    radial = dcos * cos
    dx = dy = None
    if ctx.needs_input_grad[0]:
        dx = ((dcos @ y_unit - radial.sum(1, keepdim=True) * x_unit) / x_norm).to(x.dtype)
    if ctx.needs_input_grad[1]:
        dy = ((dcos.T @ x_unit - radial.sum(0)[:, None] * y_unit) / y_norm).to(y.dtype)
    return dx, dy


torch.library.register_autograd(_OP, _backward, setup_context=_setup_context)


def cosine_similarity(x: Tensor, y: Tensor) -> Tensor:
    r"""Cosine similarity of every row of ``x`` with every row of ``y``.

    .. math:: c_{ij} = \frac{x_i \cdot y_j}{\max(\|x_i\|, 10^{-12})\,\max(\|y_j\|, 10^{-12})}

    Args:
        x: Vectors, ``[N, D]``; fp16, bf16, fp32 or fp64.
        y: Vectors to compare with, ``[M, D]``, of ``x``'s dtype.

    Returns:
        Cosine similarities in [-1, 1] up to rounding, ``[N, M]``, fp32 (fp64 for fp64 input);
        0 for a zero vector.

    Raises:
        ValueError: A shape or dtype is not as above.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"x must be [N, D] and y [M, D], got {x.shape} and {y.shape}")
    if y.dtype != x.dtype:
        raise ValueError(f"x and y must share a dtype, got {x.dtype} and {y.dtype}")
    cos: Tensor = torch.ops.tli_engine.cosine_similarity.default(x, y)[0]
    return cos
