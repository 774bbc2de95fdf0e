"""``tli_engine::dense_lora_linear`` and its gradients: schemas, shape rules, backends."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tli_engine import backends
from tli_engine.ops.autocast import cast_input, without_autocast
from tli_engine.ops.nf4_linear import check_dtype, check_sides
from tli_engine.ops.nf4_lora_linear import check_lora, differentiable_backward, fake_gradients
from tli_engine.reference.dense_lora_linear import dense_lora_linear as _reference
from tli_engine.reference.dense_lora_linear_backward import (
    dense_lora_linear_backward as _reference_backward,
)

_OP = "tli_engine::dense_lora_linear"
_BACKWARD = "tli_engine::dense_lora_linear_backward"
_SHARED = (
    "Tensor weight, {bias}Tensor lora_A, Tensor lora_B, Tensor? seed, int[] sizes, "
    "float scaling, float dropout"
)

torch.library.define(
    _OP, f"(Tensor x, {_SHARED.format(bias='Tensor? bias, ')}) -> (Tensor, Tensor)"
)
torch.library.define(
    _BACKWARD,
    f"(Tensor dy, Tensor x, Tensor s, {_SHARED.format(bias='')}, bool needs_dx, "
    "bool needs_lora) -> (Tensor, Tensor, Tensor)",
)


@torch.library.register_fake(_OP)
def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], lora_A.shape[0])


@torch.library.register_fake(_BACKWARD)
def _fake_backward(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(dy, x, args[2], args[3], *args[-2:])


torch.library.impl(_OP, "CPU")(without_autocast("cpu", _reference))
torch.library.impl(_BACKWARD, "CPU")(without_autocast("cpu", _reference_backward))


@torch.library.impl(_OP, "CUDA")
def _cuda(*args: Any) -> tuple[Tensor, Tensor]:
    return without_autocast("cuda", backends.resolve("dense_lora_linear"))(*args)  # type: ignore[no-any-return]


@torch.library.impl(_BACKWARD, "CUDA")
def _cuda_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    run = backends.resolve("dense_lora_linear_backward")
    return without_autocast("cuda", run)(*args)  # type: ignore[no-any-return]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, lora_A, lora_B, seed, *ctx.options = inputs
    ctx.save_for_backward(x, output[1], weight, lora_A, lora_B, seed)
    ctx.mark_non_differentiable(output[1])
    # no zeros for s, which has no gradient
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    needs = ctx.needs_input_grad
    # unpacked once: to do so again would run a block once more
    saved = ctx.saved_tensors
    # a way back that is to be differentiated in its turn
    op = torch.ops.tli_engine.dense_lora_linear_backward.default
    run = differentiable_backward if torch.is_grad_enabled() else op
    dx, dA, dB = run(dy, *saved, *ctx.options, needs[0], needs[3] or needs[4])
    return (
        *(dx if needs[0] else None, dy.T @ saved[0] if needs[1] else None),
        dy.sum(0) if needs[2] else None,
        *(dA if needs[3] else None, dB if needs[4] else None),
        *(None,) * 4,
    )


torch.library.register_autograd(_OP, _backward, setup_context=_setup_context)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_dtype(x)
    if weight.ndim != 2 or weight.dtype != x.dtype:
        got = f"{weight.dtype} {list(weight.shape)}"
        raise ValueError(f"weight must be {x.dtype} [N, K], got {got}")
    N, K = weight.shape
    check_sides(x, N, K, weight.device, bias)


def dense_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    sizes: Sequence[int] | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    r"""Product with a dense weight and its trained low-rank update, rounded once.

    .. math:: y_g = x\,W_g^\top + b_g + s\,\big(D(x)\,A_g^\top\big)\,B_g^\top

    Groups and dropout are those of :func:`tli_engine.ops.nf4_lora_linear`. The update is added to
    the product's sums: to a product rounded to bf16 the updates of a training's first steps, under
    1/512 of it, would in good part add nothing.

    Args:
        x: Input, ``[..., K]``, any strides, no rows allowed; bf16, fp16, fp32 or, on a CPU, fp64.
        weight: Weights of all groups, ``[N, K]``, one below the other, in ``x``'s dtype.
        lora_A: ``[groups * r, K]``, floating point; rounded to ``x``'s dtype in the product.
        lora_B: ``[N, r]`` of ``lora_A``'s dtype; rounded to ``x``'s dtype in the product.
        scaling: ``alpha / r``.
        bias: ``[N]`` of ``x``'s dtype, or None.
        sizes: Rows of each group; one group if None.
        dropout: Share of ``D(x)`` set to zero, in [0, 1).
        seed: One int64 on ``x``'s device, of this call's mask; None drops nothing.

    Returns:
        The product, ``[..., N]``, contiguous, in ``x``'s dtype.

    Raises:
        ValueError: A shape, dtype or device is not as above.

    Source: Hu et al. 2021 (LoRA), eq. 3.
    """
    x = cast_input(x)
    weight, bias = cast_input(weight), None if bias is None else cast_input(bias)
    _check(x, weight, bias)
    N, K = weight.shape
    sizes = [N] if sizes is None else list(sizes)
    check_lora(x, lora_A, lora_B, N, sizes, dropout, seed)
    options = (seed if dropout > 0 else None, sizes, scaling, dropout)
    y: Tensor = torch.ops.tli_engine.dense_lora_linear.default(
        x.reshape(-1, K), weight, bias, lora_A, lora_B, *options
    )[0]
    return y.view(*x.shape[:-1], N)
