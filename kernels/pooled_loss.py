"""The losses of pooled words' cosines, element by element: what the kernels for few and many share."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Choice(NamedTuple):
    """Which loss, and of what.

    Attributes:
        groups: Numbers of words, ``[2, N]``, or ``None``.
        loss: ``infonce``, ``triplet-hardest`` or ``triplet-semihard``.
        ways: 2 where targets choose among sources too.
        margin: Of the triplets.
        inv_temperature: Of InfoNCE.
    """

    groups: Tensor | None
    loss: str
    ways: int
    margin: float
    inv_temperature: float

    @property
    def constants(self) -> dict[str, bool | int]:
        """The kernels' constants, and how to launch kernels that have them.

        A logit that is computed twice has to be the same number both times, which it is not where
        one is part of a fused product and sum: without negatives the loss would not be zero.
        """
        return {
            "INFONCE": self.loss == "infonce",
            "WAYS": self.ways,
            "GROUPED": self.groups is not None,
            "enable_fp_fusion": False,
        }


@triton.jit
def locate(offsets_ptr, word, keep):
    """First row of each word, and number of rows, 0 where not kept."""
    start = tl.load(offsets_ptr + word, mask=keep, other=0)
    length = tl.load(offsets_ptr + word + 1, mask=keep, other=0) - start
    return start, length.to(tl.int32)


@triton.jit
def negatives_of(groups_ptr, row, column, keep, N, GROUPED: tl.constexpr):
    """Whether target ``column`` is a wrong translation of source ``row``, or the other way round."""
    negative = keep & (row != column)
    if GROUPED:
        for language in tl.static_range(2):
            ptr = groups_ptr + language * N
            group = tl.load(ptr + row, mask=row < N, other=0)
            negative &= group != tl.load(ptr + column, mask=column < N, other=0)
    return negative


@triton.jit
def semihard_of(cos, negative, positive, margin):
    """Which negatives are less like than the true translation, but within the margin."""
    gap = positive - cos
    return negative & (gap > 0) & (gap < margin)


@triton.jit
def merged(top, total, other, more, INFONCE: tl.constexpr):
    """Largest logit and sum of powers, relative to it, of two sets; or the hardest, and its ties."""
    higher = tl.maximum(top, other)
    if INFONCE:
        # of two empty sets both are -inf
        base = tl.where(higher == float("-inf"), 0.0, higher)
        return higher, total * tl.exp(top - base) + more * tl.exp(other - base)
    total = tl.where(top == higher, total, 0.0) + tl.where(other == higher, more, 0.0)
    return higher, total


@triton.jit
def gathered(top, total, AXIS: tl.constexpr, INFONCE: tl.constexpr):
    """The same of all sets along an axis."""
    highest = tl.max(top, axis=AXIS, keep_dims=True)
    if INFONCE:
        base = tl.where(highest == float("-inf"), 0.0, highest)
        total = total * tl.exp(top - base)
    else:
        total = tl.where(top == highest, total, 0.0)
    return tl.max(top, axis=AXIS), tl.sum(total, axis=AXIS)


@triton.jit
def losses_of(top, total, positive, margin, inv_temperature, INFONCE: tl.constexpr):
    """Losses, and what the gradient of a power, or of each of the hardest, is worth."""
    if INFONCE:
        return tl.log(total) + (top - positive * inv_temperature), 1 / total
    value = margin + top - positive
    # not a maximum, which would turn NaN into a loss of zero
    return tl.where(value <= 0, 0.0, value), tl.where(value > 0, 1 / tl.maximum(total, 1.0), 0.0)


@triton.jit
def gradient_of(
    cos, negative, true, top, worth, other_top, other_worth, inv_temperature, WAYS: tl.constexpr,
    INFONCE: tl.constexpr,
):  # fmt: skip
    """Gradient of the sum of the losses for cosines, given what both ways say of each."""
    if INFONCE:
        logits = tl.where(negative | true, cos * inv_temperature, float("-inf"))
        share = tl.exp(logits - top) * worth + tl.exp(logits - other_top) * other_worth
        return (share - tl.where(true, WAYS, 0).to(tl.float32)) * inv_temperature
    # the hardest are candidates, and so is every negative that is as hard
    share = tl.where(negative & (cos == top), worth, 0.0)
    share += tl.where(negative & (cos == other_top), other_worth, 0.0)
    active = tl.where(worth > 0, 1.0, 0.0) + tl.where(other_worth > 0, 1.0, 0.0)
    return share - tl.where(true, active, 0.0)


@triton.jit
def load_stats(stats_ptr, way, word, N, WAYS: tl.constexpr):
    """Top and worth of each word of one side; those of a way that is not taken are worth nothing."""
    keep = (word < N) & (way < WAYS)
    top = tl.load(stats_ptr + 2 * way * N + word, mask=keep, other=float("inf"))
    return top, tl.load(stats_ptr + (2 * way + 1) * N + word, mask=keep, other=0.0)
