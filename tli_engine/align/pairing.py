"""Cosines of pairs of words, and the ranks of translations, exactly, tile by tile on a device."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tli_engine.align.word_groups import Grouping, Side, translations_by_tile

# neighbours in CSLS's local scaling
_NEIGHBOURS = 10
# cosines this close are a tie: more than fp64 rounding, less than any fp32 vector can tell apart
_TIE = 1e-12
# distinct sources and distinct targets in a tile of cosines: 64 MB
_ROWS = 2048
_COLUMNS = 4096
# bytes of cosines kept for a second look, not computed twice
_KEPT = 1 << 28
# fp64 values of vectors that are taken at a time
_VALUES = 1 << 22
# where so many cosines are searched for the largest, the maxima of groups are searched first
_MANY = 2048
_GROUP = 16


@dataclass(frozen=True)
class Figures:
    """What the vectors of pairs measure, on their device: nothing waits until they are read.

    Attributes:
        of_pairs: Cosine, rank of the target, by CSLS too, rank of the source, by CSLS too;
            fp64, ``[5, N]``.
        random: Mean cosine over all mismatched pairs, fp64, ``[]``.
        candidates: Number of distinct targets, and of distinct sources.
    """

    of_pairs: Tensor
    random: Tensor
    candidates: tuple[int, int]


class Pairing:
    """Which words are translations of which: worked out once, for the vectors of many layers."""

    def __init__(
        self,
        source_groups: Sequence[int],
        target_groups: Sequence[int],
        device: torch.device,
        source_rows: Sequence[int] | None = None,
        target_rows: Sequence[int] | None = None,
    ) -> None:
        """Prepare the comparison.

        Args:
            source_groups: Number of the distinct word that each pair's source is, from 0.
            target_groups: The same for the targets.
            device: Where vectors will be.
            source_rows: Row of each pair's vector among those of the sources; one after another
                by default.
            target_rows: The same for the targets.
        """
        x, y = np.asarray(source_groups, np.int64), np.asarray(target_groups, np.int64)
        self._source = Side(x, source_rows, _ROWS, device)
        self._target = Side(y, target_rows, _COLUMNS, device)
        pairs, each = np.unique(x * self._target.words + y, return_inverse=True)
        translations = divmod(pairs, self._target.words)
        self._translations = translations_by_tile(self._source, self._target, *translations)
        for side, of_side in zip((self._source, self._target), translations, strict=True):
            side.count_translations(of_side)
        self._groupings = [Grouping(groups, device) for groups in (x, y, each)]
        by_source, by_target, by_both = (g.pairs_within for g in self._groupings)
        self._mismatched = len(x) ** 2 - by_source - by_target + by_both
        self._nan = torch.full((), torch.nan, dtype=torch.float64, device=device)

    @torch.no_grad()
    def measure(self, source: Tensor, target: Tensor) -> Figures:
        """Compare vectors in fp64; both are ``[V, D]``, and hold those of the pairs by row.

        A candidate that ties with the translation counts as better than it, and so does one whose
        cosine is NaN. Another translation of the same word is left out of the ranking.
        """
        x, y = self._source, self._target
        true, random = self._pair_cosines(source, target)
        ranked = true
        if not (x.stand_for_all and y.stand_for_all):
            ranked = torch.cat([(a * b).sum(1) for a, b in self._units(source, target)])
        tiles: Iterable[_Tile] = _Tiles(x, y, source, target)
        if 8 * x.words * y.words <= _KEPT:
            tiles = list(tiles)
        near_x, near_y = _Nearest(x), _Nearest(y)
        plain = _Ranking(x, y, ranked, ranked)
        for tile in tiles:
            near_x.look_at(tile.row, tile.cosine)
            near_y.look_at(tile.column, tile.cosine.T)
            self._leave_translations_out(tile)
            plain.count(0, tile.row, tile.cosine)
            plain.count(1, tile.column, tile.cosine.T)
        x_hub, y_hub = near_x.mean(), near_y.mean()
        scaled = _Ranking(x, y, 2 * ranked - y_hub[y.groups], 2 * ranked - x_hub[x.groups])
        for tile in tiles:
            self._leave_translations_out(tile)
            hub = y_hub[y.block(tile.column)]
            scaled.count(0, tile.row, torch.add(-hub, tile.cosine, alpha=2))
            hub = x_hub[x.block(tile.row)]
            scaled.count(1, tile.column, torch.add(-hub, tile.cosine.T, alpha=2))
        (forward, reverse), (csls_forward, csls_reverse) = plain.ranks(), scaled.ranks()
        of_pairs = torch.stack([true, forward, csls_forward, reverse, csls_reverse])
        return Figures(of_pairs, random, (y.words, x.words))

    def _leave_translations_out(self, tile: "_Tile") -> None:
        """Make the cosine of translations NaN, which is less than nothing."""
        places = self._translations.get((tile.row, tile.column))
        if places is not None:
            tile.cosine.index_put_(places, self._nan)

    def _units(self, source: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Unit vectors of the words that stand for each pair's, some pairs at a time."""
        step = max(1, _VALUES // source.shape[1])
        rows = (torch.split(side.own, step) for side in (self._source, self._target))
        for x, y in zip(*rows, strict=True):
            yield _unit(source[x])[0], _unit(target[y])[0]

    def _pair_cosines(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine of each pair, and the mean over all (i, j) that share neither word.

        Over all (i, j) the cosines sum up to the product of the sums of unit vectors; so do those
        of the pairs that share a word.
        """
        rows = self._source.rows, self._target.rows
        step = max(1, _VALUES // source.shape[1])
        total = torch.zeros(2, source.shape[1], dtype=torch.float64, device=source.device)
        true, norms = [], []
        for x_rows, y_rows in zip(*(torch.split(r, step) for r in rows), strict=True):
            (x, x_norm), (y, y_norm) = _unit(source[x_rows]), _unit(target[y_rows])
            total += torch.stack([x.sum(0), y.sum(0)])
            true.append((x * y).sum(1))
            norms.append(torch.stack([x_norm, y_norm]))
        cosine, (x_norms, y_norms) = torch.cat(true), torch.cat(norms, 1)
        if self._mismatched == 0:
            return cosine, self._nan
        sides = _Vectors(source, rows[0], x_norms), _Vectors(target, rows[1], y_norms)
        by_source, by_target, by_both = (_sum_within(g, cosine, *sides) for g in self._groupings)
        mismatched = total[0] @ total[1] - by_source - by_target + by_both
        return cosine, mismatched / self._mismatched


class _Vectors(NamedTuple):
    """Vectors ``[V, D]``; the row of each pair's, and its norm, ``[N, 1]``."""

    all: Tensor
    rows: Tensor
    norms: Tensor


def _sum_within(grouping: Grouping, cosine: Tensor, x: _Vectors, y: _Vectors) -> Tensor:
    """Sum of the cosines of x of one pair with y of the same or another pair of its group.

    ``cosine`` is that of each pair; a product of sums is taken some dimensions at a time.
    """
    total = cosine[grouping.alone].sum()
    pairs = grouping.repeated
    if not len(pairs):
        return total
    step = max(1, _VALUES // len(pairs))
    sides = [_Vectors(v.all, v.rows[pairs], v.norms[pairs]) for v in (x, y)]
    for start in range(0, x.all.shape[1], step):
        of_groups = []
        for v in sides:
            unit = v.all[:, start : start + step][v.rows].double() / v.norms
            of_groups.append(
                torch.segment_reduce(unit, "sum", offsets=grouping.offsets, unsafe=True)
            )
        total = total + (of_groups[0] * of_groups[1]).sum()
    return total


@dataclass(frozen=True)
class _Tile:
    """Cosines of a block of distinct sources with a block of distinct targets."""

    row: int
    column: int
    cosine: Tensor


@dataclass(frozen=True)
class _Tiles:
    """All cosines of two sides' distinct words, computed each time they are gone through."""

    x: Side
    y: Side
    source: Tensor
    target: Tensor

    def __iter__(self) -> Iterator[_Tile]:
        for column in range(self.y.blocks):
            targets, _ = _unit(self.target[self.y.first[self.y.block(column)]])
            for row in range(self.x.blocks):
                sources, _ = _unit(self.source[self.x.first[self.x.block(row)]])
                yield _Tile(row, column, sources @ targets.T)


class _Nearest:
    """The largest cosines of each word of one side, over the tiles seen so far."""

    def __init__(self, side: Side) -> None:
        self._best: list[Tensor | None] = [None] * side.blocks

    def look_at(self, block: int, cosine: Tensor) -> None:
        """Go on with the cosines of a block of words, ``[words, candidates]``."""
        best, so_far = _largest(cosine), self._best[block]
        if so_far is not None:
            best = _largest(torch.cat([so_far, best], 1))
        self._best[block] = best

    def mean(self) -> Tensor:
        """Mean cosine of each word with its nearest: CSLS's hubness, ``[words]``."""
        return torch.cat([best.mean(1) for best in self._best if best is not None])


class _Ranking:
    """Ranks of the translations by one score, both ways, counted tile by tile."""

    def __init__(self, x: Side, y: Side, forward: Tensor, reverse: Tensor) -> None:
        """Take the score of each pair, ``[N]``, among targets and among sources."""
        self._sides = x, y
        self._bars = [
            (true[side.order] - _TIE)[:, None]
            for side, true in zip(self._sides, (forward, reverse), strict=True)
        ]
        self._less = [torch.zeros_like(side.order) for side in self._sides]

    def count(self, way: int, block: int, score: Tensor) -> None:
        """Count the candidates that score less than the translation; a tie or NaN does not.

        Args:
            way: 0 among targets, 1 among sources.
            block: Of the words for which candidates are ranked.
            score: Their scores, ``[words, candidates]``.
        """
        side, less, bars = self._sides[way], self._less[way], self._bars[way]
        start, end = side.starts[block : block + 2]
        if side.local is None:
            less[start:end] += (score < bars[start:end]).sum(1)
            return
        for first in range(start, end, len(score)):
            pairs = slice(first, min(first + len(score), end))
            less[pairs] += (score[side.local[pairs]] < bars[pairs]).sum(1)

    def ranks(self) -> list[Tensor]:
        """Rank of each pair's target, then of its source, ``[N]``, fp64."""
        candidates = [side.words for side in reversed(self._sides)]
        return [
            (1 + number - side.translations - less)[side.place].double()
            for side, number, less in zip(self._sides, candidates, self._less, strict=True)
        ]


def _unit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors and norms in fp64."""
    vectors = vectors.double()
    norm = vectors.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return vectors / norm, norm


def _largest(cosine: Tensor) -> Tensor:
    """The largest cosines of each row, ``[n, m]`` to ``[n, min(m, 10)]``; NaN counts as largest.

    Where they are many, the largest are sought in the groups whose maxima are the largest.
    """
    n, m = cosine.shape
    k, groups = min(_NEIGHBOURS, m), m // _GROUP
    if m >= _MANY and groups > k:
        whole = cosine[:, : groups * _GROUP].view(n, _GROUP, groups)
        best = whole.amax(1).topk(k, sorted=False).indices[:, None]
        near = whole.gather(2, best.expand(-1, _GROUP, -1)).flatten(1)
        cosine = torch.cat([near, cosine[:, groups * _GROUP :]], 1)
    largest: Tensor = cosine.topk(k).values
    return largest
