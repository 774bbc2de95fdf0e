"""``tli_engine::counter_dropout``: schema, shape rules, backends and gradient."""

from typing import Any

import torch
from torch import Tensor

from tli_engine import backends
from tli_engine.ops.nf4_linear import check_dtype
from tli_engine.reference.counter_dropout import counter_dropout as _reference

_OP = "tli_engine::counter_dropout"

torch.library.define(_OP, "(Tensor x, Tensor seed, float p) -> Tensor")


@torch.library.register_fake(_OP)
def _fake(x: Tensor, seed: Tensor, p: float) -> Tensor:
    return x.new_empty(x.shape)


torch.library.impl(_OP, "CPU")(_reference)


@torch.library.impl(_OP, "CUDA")
def _cuda(x: Tensor, seed: Tensor, p: float) -> Tensor:
    return backends.resolve("counter_dropout")(x, seed, p)  # type: ignore[no-any-return]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None]:
    if not ctx.needs_input_grad[0]:
        return None, None, None
    # the same mask again, of the seed: it is not stored
    return torch.ops.tli_engine.counter_dropout.default(dy, *ctx.saved_tensors, ctx.p), None, None


torch.library.register_autograd(_OP, _backward, setup_context=_setup_context)


def counter_dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    r"""Dropout whose mask is a function of (seed, row, column), so that it need not be stored.

    .. math:: y_{mk} = x_{mk} \cdot [u(\mathrm{seed}, m, k) \ge p] / (1 - p)

    with :math:`u` uniform in [0, 1): the mask of :func:`tli_engine.ops.nf4_lora_linear`, which
    regenerates it inside.

    Args:
        x: Rows, ``[M, K]``, any strides, none allowed; bf16, fp16, fp32 or, on a CPU, fp64.
        seed: One int64 on ``x``'s device; the same seed gives the same mask.
        p: Share of ``x`` set to zero, in [0, 1).

    Returns:
        The rows, ``[M, K]``, contiguous, in ``x``'s dtype.

    Raises:
        ValueError: A shape, dtype or device is not as above.

    Source: Salmon et al. 2011 (Philox 4x32-10), as in Triton's ``tl.philox``.
    """
    check_dtype(x)
    if x.ndim != 2:
        raise ValueError(f"x must be [M, K], got {list(x.shape)}")
    check_seed(seed, x.device)
    if not 0 <= p < 1:
        raise ValueError(f"p must be in [0, 1), got {p}")
    y: Tensor = torch.ops.tli_engine.counter_dropout.default(x, seed, p)
    return y


def check_seed(seed: Tensor, device: torch.device) -> None:
    """Raise ``ValueError`` unless ``seed`` is one int64 on the input's device."""
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(f"seed must be one int64, got {seed.dtype} {list(seed.shape)}")
    if seed.device != device:
        raise ValueError(f"seed must be on {device} as x, got {seed.device}")
