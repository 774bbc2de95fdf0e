"""``tli_engine::cached_attention_``: schema, shape rules and backends; it has no gradient."""

from collections.abc import Callable

import torch
from torch import Tensor

from tli_engine import backends
from tli_engine.reference.cached_attention import cached_attention as _reference

_OP = "tli_engine::cached_attention_"

torch.library.define(
    _OP,
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor begin, Tensor slot, "
    "float scale, int? window=None) -> Tensor",
)


@torch.library.register_fake(_OP)
def _fake(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, begin: Tensor, slot: Tensor,
    scale: float, window: int | None = None,
) -> Tensor:  # fmt: skip
    return q.new_empty(q.shape)


torch.library.impl(_OP, "CPU")(_reference)


@torch.library.impl(_OP, "CUDA")
def _cuda(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, begin: Tensor, slot: Tensor,
    scale: float, window: int | None = None,
) -> Tensor:  # fmt: skip
    run: Callable[..., Tensor] = backends.resolve("cached_attention")
    return run(q, k, v, keys, values, begin, slot, scale, window)


def cached_attention_(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, begin: Tensor, slot: Tensor, *,
    scale: float, window: int | None = None,
) -> Tensor:  # fmt: skip
    r"""Keep one new key and value a row, then attend from its new query to all that is kept of it.

    .. math:: o_{h} = \sum_{s=b}^{t} \operatorname{softmax}_s\!\left(c\, q_h \cdot k_{s, g(h)}\right)
              v_{s, g(h)}

    with t the ``slot`` that is written, c the ``scale``, g(h) the key head of query head h, and b the
    row's ``begin``, or t - window + 1 if that is more. Slots outside have no weight; they must hold
    finite numbers, for on a CPU they are read. What changes from step to step lies on the device, so
    that one CUDA graph can be replayed for all of them.

    Args:
        q: New queries, rotated, ``[rows, Hq, D]``; bf16, fp16 or fp32, on a CPU fp64 too.
        k: New keys, rotated, ``[rows, Hkv, D]``; ``Hkv`` divides ``Hq``.
        v: New values, as ``k``.
        keys: Those kept, ``[rows, slots, Hkv, D]``, in ``q``'s dtype; slot ``slot`` is written.
        values: As ``keys``.
        begin: First slot of each row, ``[rows]``, int64, at most ``slot``; not looked at before.
        slot: The slot that is written, ``[1]``, int64, of ``slots``; not looked at before.
        scale: Factor of the scores.
        window: Tokens that a token sees, itself included; None: all before it.

    Returns:
        ``[rows, Hq, D]`` in ``q``'s dtype, contiguous.

    Raises:
        ValueError: A shape, dtype or device is not as above.

    Source: Vaswani et al. 2017, eq. 1; splitting the keys as Dao et al. 2023 (Flash-Decoding).
    """
    _check(q, k, v, keys, values)
    for name, tensor, size in (("begin", begin, len(q)), ("slot", slot, 1)):
        if tensor.shape != (size,) or tensor.dtype != torch.int64 or tensor.device != q.device:
            raise ValueError(
                f"{name} must be int64 [{size}] on {q.device}, got {tensor.dtype} "
                f"{list(tensor.shape)} on {tensor.device}"
            )
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 or None, got {window}")
    op: Callable[..., Tensor] = torch.ops.tli_engine.cached_attention_.default
    return op(q, k, v, keys, values, begin, slot, scale, window)


def _check(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> None:
    if q.ndim != 3 or not q.is_floating_point():
        raise ValueError(f"q must be floating point [rows, Hq, D], got {q.dtype} {list(q.shape)}")
    rows, heads, D = q.shape
    if k.ndim != 3 or (k.shape[0], k.shape[2]) != (rows, D) or k.shape[1] == 0:
        raise ValueError(f"k must be [{rows}, Hkv, {D}], got {list(k.shape)}")
    if heads % k.shape[1]:
        raise ValueError(f"k must have a number of heads that divides {heads}, got {k.shape[1]}")
    slots = keys.shape[1] if keys.ndim == 4 else "slots"
    kept = [rows, slots, k.shape[1], D]
    for name, tensor, shape in (
        ("v", v, list(k.shape)),
        ("keys", keys, kept),
        ("values", values, kept),
    ):
        if list(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {list(tensor.shape)}")
    for name, tensor in (("k", k), ("v", v), ("keys", keys), ("values", values)):
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name} must be {q.dtype} on {q.device} as q, got {tensor.dtype} on {tensor.device}"
            )
