"""``tli_engine::swiglu`` and its gradient: schemas, shape rules, backends."""

from typing import Any

import torch
from torch import Tensor

from tli_engine import backends
from tli_engine.ops.nf4_linear import check_dtype
from tli_engine.reference.swiglu import swiglu as _reference
from tli_engine.reference.swiglu_backward import swiglu_backward as _reference_backward

_OP = "tli_engine::swiglu"
_BACKWARD = "tli_engine::swiglu_backward"
_ACTIVATIONS = ("silu", "gelu_tanh")

torch.library.define(_OP, "(Tensor gate_up, str act) -> Tensor")
torch.library.define(_BACKWARD, "(Tensor dout, Tensor gate_up, str act) -> Tensor")


@torch.library.register_fake(_OP)
def _fake(gate_up: Tensor, act: str) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@torch.library.register_fake(_BACKWARD)
def _fake_backward(dout: Tensor, gate_up: Tensor, act: str) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


torch.library.impl(_OP, "CPU")(_reference)
torch.library.impl(_BACKWARD, "CPU")(_reference_backward)


@torch.library.impl(_OP, "CUDA")
def _cuda(gate_up: Tensor, act: str) -> Tensor:
    return backends.resolve("swiglu")(gate_up, act)  # type: ignore[no-any-return]


@torch.library.impl(_BACKWARD, "CUDA")
def _cuda_backward(dout: Tensor, gate_up: Tensor, act: str) -> Tensor:
    return backends.resolve("swiglu_backward")(dout, gate_up, act)  # type: ignore[no-any-return]


def _setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    gate_up, ctx.act = inputs
    ctx.save_for_backward(gate_up)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
    op = torch.ops.tli_engine.swiglu_backward.default
    return op(dout, *ctx.saved_tensors, ctx.act), None


torch.library.register_autograd(_OP, _backward, setup_context=_setup_context)


def swiglu(gate_up: Tensor, act: str = "silu") -> Tensor:
    r"""Multiply the second half of a projection by an activation of the first.

    .. math:: y = \operatorname{act}(g) \odot u, \qquad (g, u) = \text{gate\_up}

    The activation is computed in fp32 (fp64 for fp64) and rounded to the dtype before it is multiplied,
    as in transformers. The gradient computes it anew, in fp32, and rounds once. Nothing is copied while
    the last dimension is contiguous.

    Args:
        gate_up: Gate, then up, as one projection gives them, ``[T, 2 I]``; bf16, fp16 or fp32, on the CPU
            fp64 too.
        act: ``silu``, or ``gelu_tanh`` for the tanh form of GELU, which Gemma 3 has.

    Returns:
        The product, ``[T, I]``, contiguous, in ``gate_up``'s dtype.

    Raises:
        ValueError: A shape, dtype or name is not as above.

    Source: Shazeer 2020 (GLU Variants), eq. 6; the tanh form is Hendrycks and Gimpel 2016, section 2.
    """
    check_dtype(gate_up, "gate_up")
    if gate_up.ndim != 2 or gate_up.shape[1] < 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up must be [T, 2 I], got {list(gate_up.shape)}")
    if act not in _ACTIVATIONS:
        raise ValueError(f"act must be {' or '.join(_ACTIVATIONS)}, got {act!r}")
    out: Tensor = torch.ops.tli_engine.swiglu.default(gate_up, act)
    return out
