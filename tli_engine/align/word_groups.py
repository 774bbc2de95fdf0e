"""Which pairs share a word, and where words and translations stand in tiles, on a device."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Numbers = NDArray[np.int64]


class Side:
    """One language of the pairs.

    Attributes:
        words: Number of distinct words.
        groups: Word of each pair, ``[N]``.
        rows: Row of each pair's vector, ``[N]``.
        first: Row of each word's vector, that of the first pair that has it, ``[words]``.
        own: The same for each pair, ``[N]``.
        stand_for_all: Whether pairs of a word all have that vector.
        order: Pairs by word, ``[N]``; ``place`` is the way back.
        starts: First pair in that order of each block of words, then N.
        local: Row in its block of the word of each pair in that order; ``None`` where every word
            has one pair.
        translations: Number of distinct translations of the word of each pair in that order.
    """

    def __init__(
        self, groups: Numbers, rows: Sequence[int] | None, size: int, device: torch.device
    ) -> None:
        of_pairs = np.arange(len(groups)) if rows is None else np.asarray(rows, np.int64)
        counts = np.bincount(groups)
        order = np.argsort(groups, kind="stable")
        ends = np.concatenate([[0], counts.cumsum()])
        first = of_pairs[order[ends[:-1]]]
        self.words = len(counts)
        self.size = size
        self.blocks = -(-self.words // size)
        self.starts = [int(ends[min(b * size, self.words)]) for b in range(self.blocks + 1)]
        self.stand_for_all = bool((first[groups] == of_pairs).all())
        self._sorted = groups[order]
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        on_device = [groups, of_pairs, first, first[groups], order, place, self._sorted % size]
        self.groups, self.rows, self.first, self.own, self.order, self.place, local = (
            torch.from_numpy(a).to(device) for a in on_device
        )
        self.local = local if len(groups) > self.words else None
        self.translations = torch.empty(0)

    def block(self, number: int) -> slice:
        """The words of a block."""
        return slice(number * self.size, min((number + 1) * self.size, self.words))

    def count_translations(self, of_edges: Numbers) -> None:
        """Count the distinct translations, given this side's word of each."""
        counts = np.bincount(of_edges, minlength=self.words)[self._sorted]
        self.translations = torch.from_numpy(counts).to(self.groups.device)


class Grouping:
    """Pairs that share something.

    Attributes:
        alone: Pairs that share it with no other.
        repeated: The others, group by group.
        offsets: First of each group among ``repeated``, then their number.
        pairs_within: Number of (i, j) of one group, i = j too.
    """

    def __init__(self, groups: Numbers, device: torch.device) -> None:
        counts = np.bincount(groups)
        order = np.argsort(groups, kind="stable")
        is_alone = counts[groups[order]] == 1
        self.pairs_within = int(np.square(counts).sum())
        offsets = np.concatenate([[0], counts[counts > 1].cumsum()])
        self.alone, self.repeated, self.offsets = (
            torch.from_numpy(a).to(device) for a in (order[is_alone], order[~is_alone], offsets)
        )


def translations_by_tile(
    source: Side, target: Side, x: Numbers, y: Numbers
) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    """Place of translations in the tile of their words, by tile; tiles without any are left out.

    Args:
        source: Gives the rows of the tiles.
        target: Gives their columns.
        x: Source of each translation.
        y: Its target.
    """
    tile = np.stack([x // source.size, y // target.size])
    order = np.lexsort(tile[::-1])
    numbers, starts = np.unique(tile[:, order], axis=1, return_index=True)
    rows, columns = (
        torch.from_numpy(words[order] % side.size)
        .to(side.groups.device)
        .tensor_split(starts[1:].tolist())
        for side, words in ((source, x), (target, y))
    )
    places = zip(rows, columns, strict=True)
    return {(int(r), int(c)): place for (r, c), place in zip(numbers.T, places, strict=True)}
