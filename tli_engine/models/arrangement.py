"""Which blocks keep what for the way back, so that the least is computed twice in the memory there is.

A block consists of parts, run one after the other: attention, and what follows it. Each keeps all that
its way back reads, or its input alone, and is then run again. Where a block keeps neither, it is run
again as a whole from its own input.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Arrangement(NamedTuple):
    """What blocks keep, by their numbers.

    The blocks on top keep all: they are the first to be free again. Those below keep one part, the
    lowest ones nothing.

    Attributes:
        whole: Number of the lowest block that keeps all.
        partly: Number of the lowest block that keeps a part.
        part: Which one.
    """

    whole: int
    partly: int
    part: int = 0

    def keeps(self, number: int, parts: int) -> tuple[bool, ...]:
        """Whether each of the ``parts`` of a block is kept."""
        partly = self.partly <= number
        return tuple(number >= self.whole or (partly and p == self.part) for p in range(parts))


# no model has so many blocks
NOTHING = Arrangement(1 << 30, 1 << 30)
EVERYTHING = Arrangement(0, 0)


class Part(NamedTuple):
    """A part of a block.

    Attributes:
        kept: Bytes that it keeps beyond its input.
        work: Operations that a second run takes.
    """

    kept: int
    work: float


@dataclass(frozen=True)
class Room:
    """Bytes, and what else they have to do for.

    Attributes:
        total: There are before the blocks run.
        block: Taken on a block's way back, beside what it keeps.
        loss: Taken by the loss, when all blocks have run.
    """

    total: int
    block: int
    loss: int


def held(parts: Sequence[Part], keeps: Sequence[bool], size: int) -> int:
    """Bytes that a block holds beyond its own input of ``size`` bytes until its way back.

    Unless it is run again as a whole, the inputs of its later parts are among them.
    """
    if not any(keeps):
        return 0
    kept = sum(part.kept for part, keep in zip(parts, keeps, strict=True) if keep)
    return kept + (len(parts) - 1) * size


def peak(
    blocks: Sequence[Sequence[Part]], keeps: Sequence[Sequence[bool]], size: int, room: Room
) -> int:
    """The most bytes that are held at once, from the blocks' inputs on.

    Args:
        blocks: Lowest first.
        keeps: What each keeps.
        size: Bytes of a block's input.
        room: What is taken beside.
    """
    kept = [size + held(parts, k, size) for parts, k in zip(blocks, keeps, strict=True)]
    most, below = sum(kept) + room.loss, 0
    for parts, keep, own in zip(blocks, keeps, kept, strict=True):
        below += own
        most = max(most, below + again(parts, keep, size) + room.block)
    return most


def left(
    blocks: Sequence[Sequence[Part]], first: int, size: int, room: Room, chosen: Arrangement
) -> int:
    """Bytes that are free at the fullest moment of an arrangement; arguments as of :func:`arrange`."""
    keeps = [chosen.keeps(first + i, len(parts)) for i, parts in enumerate(blocks)]
    return room.total - peak(blocks, keeps, size, room)


def again(parts: Sequence[Part], keeps: Sequence[bool], size: int) -> int:
    """Bytes that second runs of a block add at their fullest moment; arguments as of :func:`held`."""
    if not any(keeps):
        return held(parts, [True] * len(parts), size)
    most = free = 0
    # the last part goes back first, and is free again
    for part, keep in reversed(list(zip(parts, keeps, strict=True))):
        most = max(most, 0 if keep else part.kept - free)
        free += part.kept if keep else 0
    return most


def arrange(blocks: Sequence[Sequence[Part]], first: int, size: int, room: Room) -> Arrangement:
    """The arrangement that runs the least again among those that fit; nothing is kept if none does.

    Args:
        blocks: Parts of each block that a gradient passes, lowest first.
        first: Number of the lowest.
        size: Bytes of a block's input.
        room: What there is.
    """
    number, parts = len(blocks), max(map(len, blocks), default=1)
    best, spared = Arrangement(first + number, first + number), 0.0
    for whole in range(number, -1, -1):
        for part in range(parts):
            # the more blocks keep a part, the more is held: the fewest that fit are not looked at
            for partly in range(whole + 1):
                found = Arrangement(first + whole, first + partly, part)
                keeps = [found.keeps(first + i, len(b)) for i, b in enumerate(blocks)]
                if peak(blocks, keeps, size, room) > room.total:
                    continue
                work = sum(
                    p.work for b, ks in zip(blocks, keeps, strict=True)
                    for p, k in zip(b, ks, strict=True) if k
                )  # fmt: skip
                if work > spared:
                    best, spared = found, work
                break
    return best
