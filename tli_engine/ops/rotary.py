"""``tli_engine::rotary``: schema, shape rules, backends; its gradient is the op itself, inverted."""

from typing import Any

import torch
from torch import Tensor

from tli_engine import backends
from tli_engine.ops.nf4_linear import check_dtype
from tli_engine.reference.rotary import rotary as _reference

_OP = "tli_engine::rotary"

torch.library.define(
    _OP, "(Tensor x, Tensor cos, Tensor sin, int heads, bool inverse=False) -> Tensor"
)


@torch.library.register_fake(_OP)
def _fake(x: Tensor, cos: Tensor, sin: Tensor, heads: int, inverse: bool = False) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.impl(_OP, "CPU")
def _cpu(x: Tensor, cos: Tensor, sin: Tensor, heads: int, inverse: bool = False) -> Tensor:
    return _reference(x, cos, sin, heads, inverse)


@torch.library.impl(_OP, "CUDA")
def _cuda(x: Tensor, cos: Tensor, sin: Tensor, heads: int, inverse: bool = False) -> Tensor:
    return backends.resolve("rotary")(x, cos, sin, heads, inverse)  # type: ignore[no-any-return]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.heads, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    op = torch.ops.tli_engine.rotary.default
    return op(dout, *ctx.saved_tensors, ctx.heads, not ctx.inverse), None, None, None, None


torch.library.register_autograd(_OP, _backward, setup_context=_setup_context)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, heads: int | None = None) -> Tensor:
    r"""Rotate the first heads of a joined projection by each token's angles; copy the others.

    .. math:: y_i = x_i \cos\theta_i - x_{i + D/2} \sin\theta_i, \qquad
              y_{i + D/2} = x_{i + D/2} \cos\theta_i + x_i \sin\theta_i

    Products are in fp32 (fp64 for fp64) and rounded once. ``x`` may be a view of a projection; nothing
    is copied first while its last dimension is contiguous. The gradient, which reaches ``x`` alone, is
    the rotation by the negative angles.

    Args:
        x: Queries, keys and what else is joined with them, ``[T, H, D]`` with an even D; bf16, fp16 or
            fp32, on the CPU fp64 too.
        cos: Cosines of each token's angles, in ``x``'s dtype or fp32; ``[T, D/2]``, or ``[T, D]`` with
            the second half equal to the first, as transformers makes them.
        sin: Sines, as ``cos``.
        heads: How many heads are rotated, all if ``None``.

    Returns:
        ``[T, H, D]``, contiguous, in ``x``'s dtype.

    Raises:
        ValueError: A shape, dtype, device or number is not as above.

    Source: Su et al. 2021 (RoPE), eq. 34, with dimension i paired with i + D/2, as in transformers.
    """
    check_dtype(x)
    if x.ndim != 3 or x.shape[2] < 2 or x.shape[2] % 2:
        raise ValueError(f"x must be [T, H, D] with an even D, got {list(x.shape)}")
    T, H, D = x.shape
    for name, angles in (("cos", cos), ("sin", sin)):
        if angles.shape not in ((T, D), (T, D // 2)):
            got = list(angles.shape)
            raise ValueError(f"{name} must be [{T}, {D}] or [{T}, {D // 2}], got {got}")
        if angles.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"{name} must be {x.dtype} as x, or fp32, got {angles.dtype}")
        if angles.device != x.device:
            raise ValueError(f"{name} must be on {x.device} as x, got {angles.device}")
    heads = H if heads is None else heads
    if not 0 <= heads <= H:
        raise ValueError(f"heads must be 0 to {H}, got {heads}")
    half = D // 2
    out: Tensor = torch.ops.tli_engine.rotary.default(x, cos[:, :half], sin[:, :half], heads)
    return out
