"""The loss of one batch of word pairs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from tli_engine.align.encode import pool
from tli_engine.align.losses import alignment_loss
from tli_engine.align.space import PairSpace
from tli_engine.config import AlignConfig
from tli_engine.data.words import Pack, Word, pack
from tli_engine.models.early import EarlyModel
from tli_engine.ops import cosine_similarity, pooled_alignment_loss, segment_mean


@dataclass(frozen=True)
class PairBatch:
    """Word pairs ready to run.

    Attributes:
        words: All sources, then all targets, in one pack.
        is_negative: Whether target j is a wrong translation of source i, ``[N, N]``, bool.
    """

    words: Pack
    is_negative: Tensor

    def to(self, device: torch.device) -> "PairBatch":
        """Copy to a device, without waiting for it."""
        return PairBatch(*(getattr(self, f.name).to(device) for f in fields(self)))


def pair_batch(
    source: Sequence[Word],
    target: Sequence[Word],
    source_groups: Sequence[int],
    target_groups: Sequence[int],
    mask_duplicates: bool,
) -> PairBatch:
    """Pack a batch; groups and ``mask_duplicates`` are those of :func:`negatives`."""
    groups = torch.tensor([source_groups, target_groups])
    return PairBatch(pack([*source, *target]), negatives(groups, mask_duplicates))


def negatives(groups: Tensor, mask_duplicates: bool) -> Tensor:
    """Which pairs of a batch are mismatched.

    Args:
        groups: Numbers of the pairs' sources and targets, ``[2, N]``, int64.
        mask_duplicates: Whether pairs that share a word are left out.

    Returns:
        Whether target j is a wrong translation of source i, ``[N, N]``, bool.
    """
    is_negative = ~torch.eye(groups.shape[1], dtype=torch.bool, device=groups.device)
    if mask_duplicates:
        for group in groups:
            is_negative &= group[:, None] != group
    return is_negative


@dataclass(frozen=True)
class BatchLoss:
    """Loss of a batch, and the raw cosine of its true and of its mismatched pairs; scalars."""

    loss: Tensor
    cosine_true: Tensor
    cosine_random: Tensor


def batch_loss(
    model: EarlyModel,
    batch: PairBatch,
    space: PairSpace,
    config: AlignConfig,
    gather: Callable[[Tensor], Tensor] = lambda vectors: vectors,
) -> BatchLoss:
    """Run both languages of a batch up to ``hidden_states[layer]`` in one pass, and compare.

    ``gather`` puts this process's vectors among those of the others, in the order of
    ``batch.is_negative``.
    """
    hidden = model(batch.words, config.layer)
    vectors = pool(hidden, batch.words, config.pooling)
    source, target = map(gather, vectors.chunk(2))
    cosine = cosine_similarity(space.source(source), space.target(target))
    loss = alignment_loss(cosine, batch.is_negative, config)
    with torch.no_grad():
        raw = cosine if config.space == "raw" else cosine_similarity(source, target)
        mismatched = raw[batch.is_negative]
    return BatchLoss(loss, raw.detach().diagonal().mean(), mismatched.detach().mean())


def pack_loss(
    hidden: Tensor,
    weight: Tensor,
    offsets: Tensor,
    groups: Tensor,
    space: PairSpace,
    config: AlignConfig,
) -> BatchLoss:
    """:func:`batch_loss` from a pack's hidden states, by few operations, and in tiles where N is large.

    Args:
        hidden: Of the rows of a pack of N sources and N targets, ``[T, D]``.
        weight: Weight of each row in its word's mean, ``[T]``, floating point.
        offsets: First row of each source, of each target, then the end; ``[2 N + 1]``, int64.
        groups: Numbers of the pairs' sources and targets, ``[2, N]``, int64.
        space: Where vectors are compared; not used if the configuration's is ``raw``.
        config: Space, loss, and whether pairs that share a word are left out.

    Raises:
        ValueError: A shape or dtype is not as above.
    """
    if config.space == "raw":
        return BatchLoss(*_pooled_loss(hidden, weight, offsets, groups, config))
    return vectors_loss(segment_mean(hidden, weight, offsets), groups, space, config)


def vectors_loss(
    vectors: Tensor, groups: Tensor, space: PairSpace, config: AlignConfig
) -> BatchLoss:
    """:func:`pack_loss` from the vectors of N sources and N targets, ``[2 N, D]``, fp32 or fp64."""
    # a vector is a word of one row
    weight = torch.ones_like(vectors[:, 0])
    offsets = torch.arange(len(vectors) + 1, device=vectors.device)
    if config.space == "raw":
        return BatchLoss(*_pooled_loss(vectors, weight, offsets, groups, config))
    loss, *_ = _pooled_loss(space(vectors), weight, offsets, groups, config)
    # for the raw cosines alone: of the losses this is the least work
    _, *cosines = pooled_alignment_loss(
        vectors.detach(),
        weight,
        offsets,
        groups if config.mask_duplicates else None,
        loss="triplet-hardest",
        two_way=False,
    )
    return BatchLoss(loss, *cosines)


def _pooled_loss(
    hidden: Tensor, weight: Tensor, offsets: Tensor, groups: Tensor, config: AlignConfig
) -> tuple[Tensor, Tensor, Tensor]:
    return pooled_alignment_loss(
        hidden,
        weight,
        offsets,
        groups if config.mask_duplicates else None,
        loss=config.loss,
        margin=config.margin,
        temperature=config.temperature,
        two_way=config.two_way,
    )
