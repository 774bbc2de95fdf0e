"""``tli_engine::pooled_alignment_loss`` and its gradient: schemas, shape rules, backends."""

from typing import Any

import torch
from torch import Tensor

from tli_engine import backends
from tli_engine.reference.pooled_alignment_loss import pooled_alignment_loss as _reference
from tli_engine.reference.pooled_alignment_loss_backward import (
    pooled_alignment_loss_backward as _reference_backward,
)

_OP = "tli_engine::pooled_alignment_loss"
_BACKWARD = "tli_engine::pooled_alignment_loss_backward"
_LOSSES = ("infonce", "triplet-hardest", "triplet-semihard")
# held at once, and kept for the gradient if there are no more: 64 MiB
_MOST_COSINES = 1 << 24

torch.library.define(
    _OP,
    "(Tensor hidden, Tensor weight, Tensor offsets, Tensor? groups, str loss, float margin, "
    "float temperature, bool two_way, int most_cosines) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    _BACKWARD,
    "(Tensor dloss, Tensor pooled, Tensor norm, Tensor cos, Tensor stats, Tensor weight, "
    "Tensor offsets, Tensor? groups, str loss, float temperature, ScalarType dtype, "
    "int most_cosines) -> Tensor",
)


@torch.library.register_fake(_OP)
def _fake(hidden: Tensor, weight: Tensor, offsets: Tensor, *args: Any) -> tuple[Tensor, ...]:
    two_way, most_cosines = args[-2:]
    words, H = offsets.shape[0] - 1, hidden.shape[1]
    N = words // 2
    kept = N if most_cosines >= N * N else 0
    shapes = ((), (), (), (words, H), (words,), (kept, N), (5 if two_way else 3, N))
    acc = torch.promote_types(hidden.dtype, torch.float32)
    return tuple(hidden.new_empty(shape, dtype=acc) for shape in shapes)


@torch.library.register_fake(_BACKWARD)
def _fake_backward(dloss: Tensor, pooled: Tensor, *args: Any) -> Tensor:
    weight, dtype = args[3], args[-2]
    return pooled.new_empty(weight.shape[0], pooled.shape[1], dtype=dtype)


torch.library.impl(_OP, "CPU")(_reference)
torch.library.impl(_BACKWARD, "CPU")(_reference_backward)


@torch.library.impl(_OP, "CUDA")
def _cuda(*args: Any) -> tuple[Tensor, ...]:
    return backends.resolve("pooled_alignment_loss")(*args)  # type: ignore[no-any-return]


@torch.library.impl(_BACKWARD, "CUDA")
def _cuda_backward(*args: Any) -> Tensor:
    return backends.resolve("pooled_alignment_loss_backward")(*args)  # type: ignore[no-any-return]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, offsets, groups, ctx.loss, _, ctx.temperature, _, ctx.most_cosines = inputs
    ctx.save_for_backward(*output[3:], weight, offsets, groups)
    ctx.mark_non_differentiable(*output[1:])
    # no zeros for the outputs that have no gradient: each would be a launch
    ctx.set_materialize_grads(False)
    ctx.dtype = hidden.dtype


def _backward(ctx: Any, dloss: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
    if dloss is None or not ctx.needs_input_grad[0]:
        return (None,) * 9
    op = torch.ops.tli_engine.pooled_alignment_loss_backward.default
    rest = (ctx.loss, ctx.temperature, ctx.dtype, ctx.most_cosines)
    return (op(dloss, *ctx.saved_tensors, *rest), *(None,) * 8)


torch.library.register_autograd(_OP, _backward, setup_context=_setup_context)


def pooled_alignment_loss(
    hidden: Tensor,
    weight: Tensor,
    offsets: Tensor,
    groups: Tensor | None = None,
    *,
    loss: str = "infonce",
    margin: float = 0.4,
    temperature: float = 0.05,
    two_way: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Contrastive loss of word pairs, from the hidden states of a pack of N sources and N targets.

    Words are pooled as by :func:`segment_mean` and compared as by :func:`cosine_similarity`. With
    :math:`c_{ij}` the cosine of source i and target j, and :math:`\mathcal{N}_i` the negatives of i,

    .. math:: \ell_i = -\log \frac{e^{c_{ii}/\tau}}
              {e^{c_{ii}/\tau} + \sum_{j \in \mathcal{N}_i} e^{c_{ij}/\tau}}
              \qquad\text{or}\qquad \ell_i = \max\big(0, m + \max_j c_{ij} - c_{ii}\big)

    where a triplet's j is any negative, or a semi-hard one, :math:`c_{ii} - m < c_{ij} < c_{ii}`. The
    loss is the mean over i, with ``two_way`` of both directions. Equally hard negatives share the
    gradient. Neither a mask nor, of over 4096 pairs, a whole matrix of cosines is held.

    Args:
        hidden: Hidden states of a pack, ``[T, H]``; bf16, fp16 or fp32, on the CPU fp64 too.
        weight: Weight of each token in its word's mean, ``[T]``, floating point, not negative.
        offsets: First token of each source and of each target, then the end; ``[2 N + 1]``, int64.
            Tokens beyond the end fill a pack up and are of no word: their gradient is 0.
        groups: Numbers of sources and of targets, ``[2, N]``, int64; pairs that share one are no
            negatives of each other.
        loss: ``infonce``, ``triplet-hardest`` or ``triplet-semihard``.
        margin: *m* of the triplets, a cosine.
        temperature: *τ* of InfoNCE.
        two_way: Whether targets choose among sources too.

    Returns:
        Loss, mean cosine of true pairs, and of negatives (NaN without any); scalars, fp32, of fp64
        input fp64. The loss alone is differentiable, in ``hidden``.

    Raises:
        ValueError: A shape, dtype, device or value is not as above.

    Source: van den Oord et al. 2018, eq. 4; Schroff et al. 2015, section 3.2.
    """
    _check_pack(hidden, weight, offsets)
    _check_choice(loss, margin, temperature)
    _check_groups(hidden, weight, offsets, groups)
    args = (hidden, weight, offsets, groups, loss, margin, temperature, two_way, _MOST_COSINES)
    return torch.ops.tli_engine.pooled_alignment_loss.default(*args)[:3]  # type: ignore[no-any-return]


def _check_pack(hidden: Tensor, weight: Tensor, offsets: Tensor) -> None:
    if hidden.ndim != 2 or hidden.shape[1] < 1 or weight.shape != hidden.shape[:1]:
        got = f"{list(hidden.shape)} and {list(weight.shape)}"
        raise ValueError(f"hidden must be [T, H] and weight [T], got {got}")
    if not hidden.is_floating_point() or not weight.is_floating_point():
        got = f"{hidden.dtype} and {weight.dtype}"
        raise ValueError(f"hidden and weight must be floating point, got {got}")
    if hidden.is_cuda and hidden.dtype == torch.float64:
        raise ValueError("on a GPU hidden must be bf16, fp16 or fp32, got fp64; move it to the CPU")
    if offsets.ndim != 1 or offsets.dtype != torch.int64:
        got = f"{offsets.dtype} {list(offsets.shape)}"
        raise ValueError(f"offsets must be torch.int64 [2 N + 1], got {got}")
    if offsets.shape[0] < 3 or offsets.shape[0] % 2 == 0:
        raise ValueError(
            f"offsets must be of N sources and N targets, got {len(offsets) - 1} words"
        )


def _check_groups(hidden: Tensor, weight: Tensor, offsets: Tensor, groups: Tensor | None) -> None:
    N = (offsets.shape[0] - 1) // 2
    if groups is not None and (groups.shape != (2, N) or groups.dtype != torch.int64):
        got = f"{groups.dtype} {list(groups.shape)}"
        raise ValueError(f"groups must be torch.int64 [2, {N}], got {got}")
    for name, x in (("weight", weight), ("offsets", offsets), ("groups", groups)):
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{name} must be on {hidden.device} as hidden, got {x.device}")


def _check_choice(loss: str, margin: float, temperature: float) -> None:
    if loss not in _LOSSES:
        raise ValueError(f"loss must be one of {', '.join(_LOSSES)}, got {loss!r}")
    if not margin > 0 or not temperature > 0:
        got = f"{margin} and {temperature}"
        raise ValueError(f"margin and temperature must be positive, got {got}")
