"""LoRA's narrow products beside any frozen product: their own kernels for few rows, cuBLAS for many."""

from collections.abc import Callable

import torch
from torch import Tensor

from tli_engine.kernels.counter_dropout import counter_dropout
from tli_engine.kernels.lora_down import is_few, is_narrow, lora_down, lora_down_backward
from tli_engine.kernels.lora_dx import lora_dx
from tli_engine.kernels.lora_up import lora_up
from tli_engine.kernels.lora_up_backward import is_short, lora_up_backward


def scaled(tensor: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """``tensor * scaling``, rounded once, in one launch."""
    return torch.mul(tensor, scaling, out=torch.empty_like(tensor, dtype=dtype))


def group_slices(sizes: list[int]) -> list[slice]:
    """Rows of each group."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def down(
    x: Tensor,
    lora_A: Tensor,
    groups: int,
    scaling: float,
    seed: Tensor | None,
    dropout: float,
) -> Tensor:
    """Return ``D(x) @ (scaling * A).T``, ``[M, ranks]``, in ``x``'s dtype."""
    if is_narrow(x, groups, lora_A.shape[0] // groups) and is_few(x.shape[0]):
        return lora_down(x, lora_A, scaling, seed, dropout)
    dropped = x if seed is None else counter_dropout(x, seed, dropout)
    return dropped @ scaled(lora_A, scaling, x.dtype).T


def down_backward(
    x: Tensor, t: Tensor, groups: int, seed: Tensor | None, dropout: float, dtype: torch.dtype
) -> Tensor:
    """Return ``t.T @ D(x)``, ``[ranks, K]``, the gradient of ``A``, in its ``dtype``."""
    if is_narrow(x, groups, t.shape[1] // groups) and is_few(x.shape[0]):
        return lora_down_backward(x, t, seed, dropout, dtype)
    return _product(t.T, x if seed is None else counter_dropout(x, seed, dropout), dtype)


def down_dx(
    t: Tensor, lora_A: Tensor, seed: Tensor | None, dropout: float, dx: Tensor | None = None
) -> Tensor:
    """Return ``D(t @ A)``, ``[M, K]``, the gradient of ``x`` on this way, or add it to ``dx``."""
    if seed is not None and is_narrow(t, 1, t.shape[1]):
        return lora_dx(t, lora_A, seed, dropout, dx)
    update = t @ lora_A.to(t.dtype)
    if seed is not None:
        update = counter_dropout(update, seed, dropout)
    return update if dx is None else dx.add_(update)


def up(s: Tensor, lora_B: Tensor, sizes: list[int]) -> Tensor:
    """Return ``s @ B.T``, ``[M, N]``, in ``s``'s dtype, ``B`` block-diagonal over the groups."""
    y, rank = s.new_empty(s.shape[0], lora_B.shape[0]), lora_B.shape[1]
    b = lora_B.to(s.dtype)
    for group, rows in enumerate(group_slices(sizes)):
        torch.mm(s[:, group * rank : (group + 1) * rank], b[rows].T, out=y[:, rows])
    return y


def adapted(
    x: Tensor, weight: Tensor, s: Tensor, lora_B: Tensor, bias: Tensor | None, sizes: list[int]
) -> Tensor:
    """Return ``x @ W.T + s @ B.T + bias``, ``[M, N]``, rounded once, ``B`` block-diagonal."""
    sums, rank = _product(x, weight.T, torch.float32), lora_B.shape[1]
    if is_narrow(x, len(sizes), rank):
        return lora_up(sums, s, lora_B, bias, sizes)
    for group, rows in enumerate(group_slices(sizes)):
        part = s[:, group * rank : (group + 1) * rank]
        sums[:, rows] += _product(part, lora_B[rows].to(s.dtype).T, torch.float32)
    if bias is not None:
        sums += bias
    return sums.to(x.dtype)


def up_backward(
    dy: Tensor, lora_B: Tensor, s: Tensor, sizes: list[int], scaling: float, needs_db: bool
) -> tuple[Tensor, Tensor]:
    """Return ``scaling * dy @ B``, ``[M, ranks]``, and ``dy.T @ s``, the gradient of ``B``."""
    rank = lora_B.shape[1]
    if is_narrow(dy, len(sizes), rank) and is_short(dy.shape[0], s.shape[1]):
        return lora_up_backward(dy, lora_B, s, sizes, scaling, needs_db)
    b, t, dB = scaled(lora_B, scaling, dy.dtype), torch.empty_like(s), []
    for group, rows in enumerate(group_slices(sizes)):
        columns = slice(group * rank, (group + 1) * rank)
        torch.mm(dy[:, rows], b[rows], out=t[:, columns])
        if needs_db:
            dB.append(_product(dy[:, rows].T, s[:, columns], lora_B.dtype))
    return t, torch.cat(dB) if needs_db else lora_B.new_empty(0)


def gradients(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    sizes: list[int],
    scaling: float,
    dropout: float,
    dx_of: Callable[[Tensor], Tensor] | None,
    needs_lora: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dA and dB of an adapted product; those not needed are empty.

    ``dy`` is contiguous; ``dx_of`` takes ``scaling * dy @ B`` and makes dx of it, if that is needed.
    """
    dx, dA, dB = dy.new_empty(0), lora_A.new_empty(0), lora_B.new_empty(0)
    if dy.shape[0] == 0:
        if dx_of is not None:
            dx = dy.new_empty(0, lora_A.shape[1])
        if needs_lora:
            dA, dB = lora_A.new_zeros(lora_A.shape), lora_B.new_zeros(lora_B.shape)
        return dx, dA, dB
    t, dB = up_backward(dy, lora_B, s, sizes, scaling, needs_lora)
    if dx_of is not None:
        dx = dx_of(t)
    if needs_lora:
        dA = down_backward(x.contiguous(), t, len(sizes), seed, dropout, lora_A.dtype)
    return dx, dA, dB


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` in another dtype: an fp32 gradient, or sum, is not rounded to 16 bits first."""
    if dtype == a.dtype:
        return a @ b
    if dtype != torch.float32:
        return (a @ b).to(dtype)
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else a.to(dtype) @ b.to(dtype)
