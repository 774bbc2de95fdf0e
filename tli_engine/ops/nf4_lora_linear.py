"""``tli_engine::nf4_lora_linear`` and its gradients: schemas, shape rules, backends."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tli_engine import backends
from tli_engine.nf4 import NF4Weight
from tli_engine.ops.autocast import cast_input, without_autocast
from tli_engine.ops.counter_dropout import check_seed
from tli_engine.ops.nf4_linear import Numerics, check_linear
from tli_engine.reference.counter_dropout import counter_dropout
from tli_engine.reference.dense_lora_linear_backward import dense_lora_linear_backward
from tli_engine.reference.nf4_linear import decoded
from tli_engine.reference.nf4_lora_linear import nf4_lora_linear as _reference
from tli_engine.reference.nf4_lora_linear_backward import (
    nf4_lora_linear_backward as _reference_backward,
)

_OP = "tli_engine::nf4_lora_linear"
_BACKWARD = "tli_engine::nf4_lora_linear_backward"
_SHARED = (
    "Tensor packed, Tensor absmax, {bias}Tensor lora_A, Tensor lora_B, Tensor? seed, "
    "int[] sizes, float scaling, float dropout, int block_size, bool tiled, bool fast"
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
def _fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    lora_A, lora_B = args[3], args[4]
    M = x.shape[0]
    return x.new_empty(M, lora_B.shape[0]), x.new_empty(M, lora_A.shape[0])


@torch.library.register_fake(_BACKWARD)
def _fake_backward(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(dy, x, args[3], args[4], *args[-2:])


def fake_gradients(
    dy: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, needs_dx: bool, needs_lora: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of dx, dA and dB of an adapted product; those not needed are empty."""
    dx = dy.new_empty(x.shape if needs_dx else (0,))
    dA = lora_A.new_empty(lora_A.shape if needs_lora else (0,))
    return dx, dA, lora_B.new_empty(lora_B.shape if needs_lora else (0,))


torch.library.impl(_OP, "CPU")(without_autocast("cpu", _reference))
torch.library.impl(_BACKWARD, "CPU")(without_autocast("cpu", _reference_backward))


@torch.library.impl(_OP, "CUDA")
def _cuda(*args: Any) -> tuple[Tensor, Tensor]:
    return without_autocast("cuda", backends.resolve("nf4_lora_linear"))(*args)  # type: ignore[no-any-return]


@torch.library.impl(_BACKWARD, "CUDA")
def _cuda_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    run = backends.resolve("nf4_lora_linear_backward")
    return without_autocast("cuda", run)(*args)  # type: ignore[no-any-return]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, packed, absmax, _, lora_A, lora_B, seed, *ctx.options = inputs
    ctx.save_for_backward(x, output[1], packed, absmax, lora_A, lora_B, seed)
    ctx.mark_non_differentiable(output[1])
    # no zeros for s, which has no gradient
    ctx.set_materialize_grads(False)


def differentiable_backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    sizes: Sequence[int],
    scaling: float,
    dropout: float,
    *needs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients in plain PyTorch, where ``s`` depends on ``x`` and ``A`` as it does in truth."""
    dropped = x if seed is None else counter_dropout(x, seed, dropout)
    s = dropped @ (lora_A * scaling).to(x.dtype).T
    adapter = (lora_A, lora_B, seed, sizes, scaling, dropout)
    return dense_lora_linear_backward(dy, x, s, weight, *adapter, *needs)


def _differentiable_backward(
    dy: Tensor, x: Tensor, s: Tensor, packed: Tensor, absmax: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with the weight decoded in full."""
    *adapter, block_size, tiled, _, needs_dx, needs_lora = args
    weight = dy.new_empty(0)
    if needs_dx:
        N, K = dy.shape[1], x.shape[1]
        weight = decoded(packed, absmax, N, K, block_size, tiled, dy.dtype)
    return differentiable_backward(dy, x, s, weight, *adapter, needs_dx, needs_lora)


def _backward(ctx: Any, dy: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 13
    needs = ctx.needs_input_grad
    # unpacked once: to do so again would run a block once more
    saved = ctx.saved_tensors
    # a way back that is to be differentiated in its turn
    op = torch.ops.tli_engine.nf4_lora_linear_backward.default
    run = _differentiable_backward if torch.is_grad_enabled() else op
    dx, dA, dB = run(dy, *saved, *ctx.options, needs[0], needs[4] or needs[5])
    return (
        *(dx if needs[0] else None, None, None, dy.sum(0) if needs[3] else None),
        *(dA if needs[4] else None, dB if needs[5] else None),
        *(None,) * 7,
    )


torch.library.register_autograd(_OP, _backward, setup_context=_setup_context)


def check_lora(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    N: int,
    sizes: Sequence[int],
    dropout: float,
    seed: Tensor | None,
) -> None:
    """Raise ``ValueError`` unless the adapter fits the weight; see :func:`nf4_lora_linear`."""
    if not sizes or sum(sizes) != N or min(sizes) < 1:
        raise ValueError(f"sizes must be positive and add up to {N}, got {list(sizes)}")
    if lora_B.ndim != 2 or lora_B.shape[0] != N or lora_B.shape[1] == 0:
        raise ValueError(f"lora_B must be [{N}, r] with r > 0, got {list(lora_B.shape)}")
    rows, K = len(sizes) * lora_B.shape[1], x.shape[-1]
    if lora_A.shape != (rows, K):
        raise ValueError(f"lora_A must be [{rows}, {K}], got {list(lora_A.shape)}")
    if lora_A.dtype != lora_B.dtype or lora_A.device != lora_B.device:
        got = f"{lora_A.dtype} on {lora_A.device} and {lora_B.dtype} on {lora_B.device}"
        raise ValueError(f"lora_A and lora_B must share dtype and device, got {got}")
    if not lora_A.is_floating_point():
        raise ValueError(f"lora_A and lora_B must be floating point, got {lora_A.dtype}")
    if lora_A.device != x.device:
        raise ValueError(f"lora_A must be on {x.device} as x, got {lora_A.device}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if seed is not None:
        check_seed(seed, x.device)


def nf4_lora_linear(
    x: Tensor,
    weight: NF4Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    sizes: Sequence[int] | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    numerics: Numerics = "exact",
) -> Tensor:
    r"""Product with a frozen NF4 weight and its trained low-rank update.

    .. math:: y_g = x\,W_g^\top + b_g + s\,\big(D(x)\,A_g^\top\big)\,B_g^\top

    for each group :math:`g` of rows: q, k and v, say, that share an input, and here the mask of the
    dropout :math:`D` too: a function of ``seed``, never stored. Second derivatives decode the weight.

    Args:
        x: Input, ``[..., K]``, any strides, no rows allowed; bf16, fp16, fp32 or, on a CPU, fp64.
        weight: Frozen weights of all groups, ``[N, K]``, one below the other.
        lora_A: ``[groups * r, K]``, floating point; rounded to ``x``'s dtype in the product.
        lora_B: ``[N, r]`` of ``lora_A``'s dtype; rounded to ``x``'s dtype in the product.
        scaling: ``alpha / r``.
        bias: ``[N]`` of ``x``'s dtype, or None.
        sizes: Rows of each group; one group if None.
        dropout: Share of ``D(x)`` set to zero, in [0, 1).
        seed: One int64 on ``x``'s device, of this call's mask; None drops nothing.
        numerics: As for :func:`tli_engine.ops.nf4_linear`.

    Returns:
        The product, ``[..., N]``, contiguous, in ``x``'s dtype.

    Raises:
        ValueError: A shape, dtype or device is not as above.

    Source: Hu et al. 2021 (LoRA), eq. 3; Dettmers et al. 2023 (QLoRA), eq. 5.
    """
    x, bias = cast_input(x), None if bias is None else cast_input(bias)
    check_linear(x, weight, bias, numerics)
    N, K = weight.shape
    sizes = [N] if sizes is None else list(sizes)
    check_lora(x, lora_A, lora_B, N, sizes, dropout, seed)
    stored = (weight.packed, weight.absmax_fp32(), bias, lora_A, lora_B)
    used = seed if dropout > 0 else None
    options = (used, sizes, scaling, dropout, weight.block_size, False, numerics == "fast")
    y: Tensor = torch.ops.tli_engine.nf4_lora_linear.default(x.reshape(-1, K), *stored, *options)[0]
    return y.view(*x.shape[:-1], N)
