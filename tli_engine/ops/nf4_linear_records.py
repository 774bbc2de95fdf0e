"""``tli_engine::nf4_linear_records`` and its gradients: schemas, shape rules, backends.

The op of :class:`tli_engine.nn.NF4Linear` where the CUDA extension runs: the weight is laid out for
the Hopper kernel, and the same op carries the LoRA update.
"""

from typing import Any

import torch
from torch import Tensor

from tli_engine import backends
from tli_engine.ops.autocast import without_autocast
from tli_engine.ops.nf4_lora_linear import differentiable_backward
from tli_engine.reference.nf4_linear import decoded
from tli_engine.reference.nf4_linear_records import nf4_linear_records as _reference
from tli_engine.reference.nf4_linear_records_backward import (
    nf4_linear_records_backward as _reference_backward,
)
from tli_engine.reference.nf4_records import from_records as from_records
from tli_engine.reference.nf4_records import to_records as to_records

_OP = "tli_engine::nf4_linear_records"
_BACKWARD = "tli_engine::nf4_linear_records_backward"
_SHARED = (
    "Tensor records, Tensor? transposed, {bias}Tensor? lora_A, Tensor? lora_B, Tensor? seed, "
    "int[] sizes, float scaling, float dropout"
)

torch.library.define(
    _OP,
    f"(Tensor x, {_SHARED.format(bias='Tensor? bias, ')}, SymInt N, bool fast) -> (Tensor, Tensor)",
)
torch.library.define(
    _BACKWARD,
    f"(Tensor dy, Tensor? x, Tensor s, {_SHARED.format(bias='')}, SymInt K, bool fast, "
    "bool needs_dx, bool needs_lora) -> (Tensor, Tensor, Tensor)",
)


@torch.library.register_fake(_OP)
def _fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    lora_A, N = args[3], args[-2]
    ranks = 0 if lora_A is None else lora_A.shape[0]
    return x.new_empty(x.shape[0], N), x.new_empty(x.shape[0], ranks)


@torch.library.register_fake(_BACKWARD)
def _fake_backward(dy: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    lora_A, lora_B = args[4], args[5]
    K, _, needs_dx, needs_lora = args[-4:]
    dx = dy.new_empty((dy.shape[0], K) if needs_dx else (0,))
    if lora_A is None:
        return dx, dy.new_empty(0), dy.new_empty(0)
    dA = lora_A.new_empty(lora_A.shape if needs_lora else (0,))
    return dx, dA, lora_B.new_empty(lora_B.shape if needs_lora else (0,))


torch.library.impl(_OP, "CPU")(without_autocast("cpu", _reference))
torch.library.impl(_BACKWARD, "CPU")(without_autocast("cpu", _reference_backward))


@torch.library.impl(_OP, "CUDA")
def _cuda(*args: Any) -> tuple[Tensor, Tensor]:
    run = backends.resolve("nf4_linear_records")
    return without_autocast("cuda", run)(*args)  # type: ignore[no-any-return]


@torch.library.impl(_BACKWARD, "CUDA")
def _cuda_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    run = backends.resolve("nf4_linear_records_backward")
    return without_autocast("cuda", run)(*args)  # type: ignore[no-any-return]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, records, transposed, _, lora_A, lora_B, seed, *ctx.adapter, _, ctx.fast = inputs
    # without an adapter nothing of the input is needed
    kept = None if lora_A is None else x
    ctx.save_for_backward(kept, output[1], records, transposed, lora_A, lora_B, seed)
    ctx.K = x.shape[1]
    ctx.mark_non_differentiable(output[1])
    # no zeros for s, which has no gradient
    ctx.set_materialize_grads(False)


def _differentiable_backward(
    dy: Tensor, x: Tensor, s: Tensor, records: Tensor, _: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients with an adapter in plain PyTorch, the weight decoded in full."""
    *adapter, K, _fast, needs_dx, needs_lora = args
    weight = dy.new_empty(0)
    if needs_dx:
        N = dy.shape[1]
        weight = decoded(*from_records(records, N, K, False), N, K, 64, False, dy.dtype)
    return differentiable_backward(dy, x, s, weight, *adapter, needs_dx, needs_lora)


def _backward(ctx: Any, dy: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 12
    needs = ctx.needs_input_grad
    # unpacked once: to do so again would run a block once more
    saved = ctx.saved_tensors
    # a way back that is to be differentiated in its turn; without an adapter the op is
    adapted = torch.is_grad_enabled() and saved[0] is not None
    op = torch.ops.tli_engine.nf4_linear_records_backward.default
    run = _differentiable_backward if adapted else op
    options = (*ctx.adapter, ctx.K, ctx.fast, needs[0], needs[4] or needs[5])
    dx, dA, dB = run(dy, *saved, *options)
    return (
        *(dx if needs[0] else None, None, None, dy.sum(0) if needs[3] else None),
        *(dA if needs[4] else None, dB if needs[5] else None),
        *(None,) * 6,
    )


torch.library.register_autograd(_OP, _backward, setup_context=_setup_context)


def _setup_context_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, _, records, transposed, lora_A, *_, ctx.fast, _, _ = inputs
    if lora_A is not None:
        raise NotImplementedError(
            "nf4_linear_records_backward with an adapter has no derivative; nf4_linear_records has a second"
        )
    ctx.save_for_backward(records, transposed)
    ctx.N = inputs[0].shape[1]
    ctx.set_materialize_grads(False)


def _backward_backward(ctx: Any, ddx: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
    ddy = None
    if ddx is not None and ctx.needs_input_grad[0]:
        records, transposed = ctx.saved_tensors
        ddy = torch.ops.tli_engine.nf4_linear_records.default(
            ddx, records, transposed, None, None, None, None, [], 1.0, 0.0, ctx.N, ctx.fast
        )[0]
    return (ddy, *(None,) * 14)


torch.library.register_autograd(
    _BACKWARD, _backward_backward, setup_context=_setup_context_backward
)
