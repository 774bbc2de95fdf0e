"""``tli_engine::word_attention`` and its gradients: schemas, shape rules, backends."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tli_engine import backends
from tli_engine.reference.word_attention import word_attention as _reference
from tli_engine.reference.word_attention_backward import (
    word_attention_backward as _reference_backward,
)

_OP = "tli_engine::word_attention"
_BACKWARD = "tli_engine::word_attention_backward"
_JOINED = "tli_engine::joined_word_attention"
_SHARED = "Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor bounds"
# what the kernels' tiles hold
_WIDEST_ON_GPU = 256

torch.library.define(_OP, f"({_SHARED}, float scale) -> (Tensor, Tensor)")
torch.library.define(
    _JOINED,
    "(Tensor qkv, int heads, Tensor cos, Tensor sin, Tensor bounds, float scale)"
    " -> (Tensor, Tensor)",
)
torch.library.define(
    _BACKWARD, f"(Tensor dout, {_SHARED}, Tensor out, Tensor lse, float scale) -> Tensor"
)


@torch.library.register_fake(_OP)
def _fake(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    acc = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=acc)


@torch.library.register_fake(_BACKWARD)
def _fake_backward(dout: Tensor, q: Tensor, k: Tensor, *args: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1] + 2 * k.shape[1], q.shape[2])


torch.library.impl(_OP, "CPU")(_reference)
torch.library.impl(_BACKWARD, "CPU")(_reference_backward)


@torch.library.impl(_OP, "CUDA")
def _cuda(*args: Any) -> tuple[Tensor, Tensor]:
    return backends.resolve("word_attention")(*args)  # type: ignore[no-any-return]


@torch.library.impl(_BACKWARD, "CUDA")
def _cuda_backward(*args: Any) -> Tensor:
    return backends.resolve("word_attention_backward")(*args)  # type: ignore[no-any-return]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    # no zeros for lse, which has no gradient
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 7
    q, k = ctx.saved_tensors[:2]
    dqkv = torch.ops.tli_engine.word_attention_backward.default(dout, *ctx.saved_tensors, ctx.scale)
    grads = dqkv.split([q.shape[1], k.shape[1], k.shape[1]], dim=1)
    needed = (g if n else None for g, n in zip(grads, ctx.needs_input_grad[:3], strict=True))
    return (*needed, None, None, None, None)


torch.library.register_autograd(_OP, _backward, setup_context=_setup_context)


def _heads_of(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    kv_heads = (qkv.shape[1] - heads) // 2
    return torch.split(qkv, [heads, kv_heads, kv_heads], 1)


@torch.library.register_fake(_JOINED)
def _fake_joined(qkv: Tensor, heads: int, *args: Any) -> tuple[Tensor, Tensor]:
    acc = torch.promote_types(qkv.dtype, torch.float32)
    out = qkv.new_empty(qkv.shape[0], heads, qkv.shape[2])
    return out, out.new_empty(out.shape[:2], dtype=acc)


@torch.library.impl(_JOINED, "CPU")
def _joined_reference(
    qkv: Tensor, heads: int, cos: Tensor, sin: Tensor, bounds: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = _heads_of(qkv, heads)
    return _reference(q, k, v, cos, sin, bounds, scale)


@torch.library.impl(_JOINED, "CUDA")
def _joined_cuda(qkv: Tensor, heads: int, *args: Any) -> tuple[Tensor, Tensor]:
    return backends.resolve("word_attention")(*_heads_of(qkv, heads), *args)  # type: ignore[no-any-return]


def _setup_context_joined(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, ctx.heads, *tensors, ctx.scale = inputs
    ctx.save_for_backward(qkv, *tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward_joined(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None or not ctx.needs_input_grad[0]:
        return (None,) * 6
    qkv, *tensors = ctx.saved_tensors
    op = torch.ops.tli_engine.word_attention_backward.default
    return (op(dout, *_heads_of(qkv, ctx.heads), *tensors, ctx.scale), *(None,) * 5)


torch.library.register_autograd(_JOINED, _backward_joined, setup_context=_setup_context_joined)


def joined_word_attention(
    qkv: Tensor,
    heads: Sequence[int],
    cos: Tensor,
    sin: Tensor,
    bounds: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """:func:`word_attention` of one projection that holds q, k and v: its gradient is one tensor.

    Autograd would put together what it takes of three views by a launch of its own.

    Args:
        qkv: Queries, then keys, then values, ``[T, Hq + 2 Hkv, D]``, contiguous.
        heads: ``[Hq, Hkv, Hkv]``.
        cos: As for :func:`word_attention`, and so the others.
        sin: Sines.
        bounds: Of each token's word.
        scale: Factor of the scores.

    Returns:
        ``[T, Hq, D]``, contiguous, in ``qkv``'s dtype.

    Raises:
        ValueError: A shape, dtype or device is not as above.
    """
    if qkv.ndim != 3 or len(heads) != 3 or sum(heads) != qkv.shape[1]:
        raise ValueError(f"qkv must be [T, {sum(heads)}, D], got {list(qkv.shape)}")
    q, k, v = torch.split(qkv, list(heads), 1)
    _check_heads(q, k, v)
    _check_tokens(q, cos, sin, bounds)
    D = qkv.shape[2]
    op = torch.ops.tli_engine.joined_word_attention.default
    angles = cos[:, : D // 2], sin[:, : D // 2]
    out: Tensor = op(qkv, heads[0], *angles, bounds, D**-0.5 if scale is None else scale)[0]
    return out


def word_bounds(offsets: Tensor, tokens: int) -> Tensor:
    """First row, and one past the last row, of the word of each token of a pack.

    Args:
        offsets: First token of each word, then ``T``; ``[S + 1]``, int32 or int64, ascending, the
            first 0 and the last ``tokens``, which is not checked: it would wait for the device.
        tokens: ``T``; given, so that no device is waited for.

    Returns:
        Int32, ``[2, T]``, on ``offsets``' device; made once a pack, for all layers.

    Raises:
        ValueError: A shape or dtype is not as above.
    """
    if offsets.ndim != 1 or offsets.shape[0] < 1:
        raise ValueError(f"offsets must be [S + 1], got {list(offsets.shape)}")
    if offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"offsets must be int32 or int64, got {offsets.dtype}")
    if tokens > 0 and offsets.shape[0] == 1:
        raise ValueError(f"offsets of no word, but {tokens} tokens")
    rows = torch.arange(tokens, dtype=offsets.dtype, device=offsets.device)
    # offsets are sorted: the word of a token ends at the first offset beyond it
    end = torch.searchsorted(offsets, rows, right=True)
    return offsets[torch.stack([end - 1, end])].to(torch.int32)


def word_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    bounds: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    r"""Causal self-attention within each word of a pack, with rotary embedding and grouped queries.

    .. math:: o_t = \sum_{j=b_t}^{t} \operatorname{softmax}_j\big(s\,(R_t q_t) \cdot (R_j k_j)\big)\, v_j

    where :math:`b_t` is the first token of t's word and :math:`R_t` rotates dimension i with
    i + D/2 by t's angles. The words may be of any length; on a GPU the short ones are fast. ``q``,
    ``k`` and ``v`` may be views of one projection; nothing is copied while their last dimension is
    contiguous. Gradients reach ``q``, ``k`` and ``v`` alone, and are views of one ``[T, Hq + 2 Hkv, D]``.
    A value that is not finite may also reach words next to its own.

    Args:
        q: Queries, not rotated, ``[T, Hq, D]``; bf16, fp16 or fp32, on the CPU fp64 too. D is even,
            on a GPU at most 256.
        k: Keys, not rotated, ``[T, Hkv, D]``, of ``q``'s dtype; ``Hkv`` divides ``Hq``.
        v: Values, as ``k``.
        cos: Cosines of each token's angles, floating point; ``[T, D/2]``, or ``[T, D]`` with the
            second half equal to the first, as transformers makes them.
        sin: Sines, as ``cos``.
        bounds: What :func:`word_bounds` returns, int32, ``[2, T]``.
        scale: Factor of the scores, ``D ** -0.5`` if None.

    Returns:
        Attention output, ``[T, Hq, D]``, contiguous, in ``q``'s dtype.

    Raises:
        ValueError: A shape, dtype or device is not as above.

    Source: Vaswani et al. 2017, eq. 1; Su et al. 2021 (RoPE), eq. 34; the recomputing backward is
    that of Dao et al. 2022 (FlashAttention), section 3.1.
    """
    _check_heads(q, k, v)
    _check_tokens(q, cos, sin, bounds)
    D = q.shape[2]
    cos, sin = cos[:, : D // 2], sin[:, : D // 2]
    op = torch.ops.tli_engine.word_attention.default
    out: Tensor = op(q, k, v, cos, sin, bounds, D**-0.5 if scale is None else scale)[0]
    return out


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 3 or q.shape[1] < 1 or q.shape[2] < 2 or q.shape[2] % 2:
        raise ValueError(f"q must be [T, Hq, D] with an even D, got {list(q.shape)}")
    T, heads, D = q.shape
    if k.ndim != 3 or k.shape[0] != T or k.shape[2] != D:
        raise ValueError(f"k must be [{T}, Hkv, {D}], got {list(k.shape)}")
    if k.shape[1] < 1 or heads % k.shape[1]:
        raise ValueError(f"heads of k must divide the {heads} of q, got {k.shape[1]}")
    if v.shape != k.shape:
        raise ValueError(f"v must be {list(k.shape)} as k, got {list(v.shape)}")
    if not q.is_floating_point() or k.dtype != q.dtype or v.dtype != q.dtype:
        got = f"{q.dtype}, {k.dtype} and {v.dtype}"
        raise ValueError(f"q, k and v must share a floating-point dtype, got {got}")
    for name, x in (("k", k), ("v", v)):
        if x.device != q.device:
            raise ValueError(f"{name} must be on {q.device} as q, got {x.device}")
    if q.is_cuda and (q.dtype == torch.float64 or D > _WIDEST_ON_GPU):
        raise ValueError(
            f"on a GPU q must be bf16, fp16 or fp32 with D at most {_WIDEST_ON_GPU}, got {q.dtype} "
            f"with D = {D}; move it to the CPU"
        )


def _check_tokens(q: Tensor, cos: Tensor, sin: Tensor, bounds: Tensor) -> None:
    T, _, D = q.shape
    for name, x in (("cos", cos), ("sin", sin)):
        if x.shape not in ((T, D), (T, D // 2)):
            got = list(x.shape)
            raise ValueError(f"{name} must be [{T}, {D}] or [{T}, {D // 2}], got {got}")
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
    if bounds.dtype != torch.int32 or bounds.shape != (2, T):
        shape = list(bounds.shape)
        raise ValueError(f"bounds must be torch.int32 [2, {T}], got {bounds.dtype} {shape}")
    for name, x in (("cos", cos), ("sin", sin), ("bounds", bounds)):
        if x.device != q.device:
            raise ValueError(f"{name} must be on {q.device} as q, got {x.device}")
