"""Batches of word pairs as tensors of fixed shapes, filled up so that few shapes occur."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tli_engine.align.pooling import pooling_weight
from tli_engine.config import Pooling
from tli_engine.data.words import Word, pack
from tli_engine.train.device_buffer import DeviceBuffer, Layout

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """A batch of N pairs in T rows, of which the last may belong to no word.

    Attributes:
        rows: Where each row's input lies in the table of inputs, ``[T]``, int64.
        positions: Position of each row in its word, ``[T]``, int64.
        weight: Weight of each row in its word's mean, ``[T]``, fp32; 0 for rows of no word.
        bounds: First row, and one past the last row, of each row's word, int32, ``[2, T]``.
        offsets: First row of each source, of each target, then one past the last; ``[2 N + 1]``, int64.
        groups: Numbers of the pairs' sources and targets, ``[2, N]``, int64; where several ranks
            share the pairs, of all.
        seeds: Of the dropout masks, ``[S]``, int64.
    """

    rows: Tensor
    positions: Tensor
    weight: Tensor
    bounds: Tensor
    offsets: Tensor
    groups: Tensor
    seeds: Tensor


class BatchBuffer(DeviceBuffer[Batch]):
    """A batch's tensors on a device, and how they get there."""

    def __init__(
        self, tokens: int, pairs: int, seeds: int, device: torch.device, everyone: int | None = None
    ) -> None:
        """Make room for some rows and pairs; ``everyone``: pairs of all ranks, if others have some."""
        self.tokens, self.pairs = tokens, pairs
        layout: Layout = {
            "rows": (torch.int64, (tokens,)),
            "positions": (torch.int64, (tokens,)),
            "weight": (torch.float32, (tokens,)),
            "bounds": (torch.int32, (2, tokens)),
            "offsets": (torch.int64, (2 * pairs + 1,)),
            "groups": (torch.int64, (2, everyone or pairs)),
            "seeds": (torch.int64, (seeds,)),
        }
        super().__init__(Batch, layout, device)


class WordTable:
    """The rows and pooling weights of a list of words, for batches to pick from."""

    def __init__(self, words: Sequence[Word], rows: Sequence[Sequence[int]], pooling: Pooling):
        """Take the words, and where each of their tokens' inputs lies."""
        packed = pack(words)
        self.lengths: Ints = np.array([len(word) for word in words], dtype=np.int64)
        self._starts: Ints = np.concatenate([[0], self.lengths.cumsum()[:-1]])
        self._rows: Ints = np.fromiter(chain.from_iterable(rows), dtype=np.int64)
        self._weight = pooling_weight(packed, pooling).numpy()

    def write(self, chosen: Ints, batch: Batch) -> None:
        """Write the rows of the chosen words into ``batch``; rows past the last are of no word."""
        lengths = self.lengths[chosen]
        ends = lengths.cumsum()
        tokens, total = int(ends[-1]), len(batch.rows)
        first = np.repeat(ends - lengths, lengths)
        position = np.arange(tokens) - first
        source = np.repeat(self._starts[chosen], lengths) + position
        filling = np.arange(tokens, total)
        rows, positions, weight = (t.numpy() for t in (batch.rows, batch.positions, batch.weight))
        rows[:tokens], rows[tokens:] = self._rows[source], 0
        positions[:tokens], positions[tokens:] = position, 0
        weight[:tokens], weight[tokens:] = self._weight[source], 0
        bounds = batch.bounds.numpy()
        bounds[0, :tokens], bounds[0, tokens:] = first, filling
        bounds[1, :tokens], bounds[1, tokens:] = np.repeat(ends, lengths), filling + 1
        offsets = batch.offsets.numpy()
        offsets[0], offsets[1:] = 0, ends


def padded(tokens: int) -> int:
    """Rows that a batch gets, so that few shapes occur: at most a sixteenth, or 15, of no word."""
    step = 16
    while step * 32 < tokens:
        step *= 2
    return -(-tokens // step) * step
