"""Runs blocks that keep for the way back all that they compute, a part of it, or only their input."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tli_engine.models.arrangement import (
    EVERYTHING,
    NOTHING,
    Arrangement,
    Part,
    Room,
    arrange,
    left,
)
from tli_engine.nn import run_again

Policy = Literal["auto", "save", "recompute"]


Half = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Block:
    """A block on the rows of a pack; its input is the sum of two tensors, and so is its output.

    Attributes:
        parts: All of it, or all but its last layer, as parts that run one after the other.
        last: The last layer, of the first tensor, where its way back needs nothing of its input: it is
            never run again.
        work: Operations of each part.
    """

    parts: tuple[Half, ...]
    last: Callable[[Tensor], Tensor] | None = None
    work: tuple[float, ...] = (1.0,)

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Run the block."""
        return self.finish(*self.trunk(x, residual))

    def trunk(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Run all parts."""
        for part in self.parts:
            x, residual = part(x, residual)
        return x, residual

    def finish(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Run the last layer on what the parts returned."""
        return (x if self.last is None else self.last(x)), residual


@dataclass(frozen=True)
class Reserve:
    """Bytes that a plan leaves for what it does not decide on.

    Attributes:
        states: Gradients and optimizer states to come.
        block_of_token: On a block's way back, beside what it keeps, a token; 0 where that is not known.
        block: There too, for packs of any size.
        loss: Of the loss, for packs of any size.
        loss_of_token: Of the loss, a token.
    """

    states: int
    block_of_token: int
    block: int
    loss: int
    loss_of_token: int


class Spread(Protocol):
    """Weights of which each of several GPUs holds a share, gathered block by block."""

    @property
    def undecided(self) -> bool:
        """Whether :meth:`decide` is to be called before the first way back."""

    @property
    def to_come(self) -> int:
        """Bytes of gradients, of optimizer states and of blocks on their way."""

    def place_gradients(self) -> None:
        """Have gradients of tensors that have none lie where those before them lay, from here on."""

    @property
    def placed(self) -> int | None:
        """Bytes of these places, also while there are no gradients; None where gradients have none."""

    def begin(self) -> None:
        """A pass of the model begins."""

    def run(
        self, number: int, work: Half, x: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Do a block's work with its weights gathered."""

    def gathered(self, number: int) -> AbstractContextManager[None]:
        """A block's weights, gathered for as long as it lasts."""

    def largest(self, values: Sequence[float]) -> list[float]:
        """Largest of each over the GPUs, which decide alike."""

    def decide(self, free: int | None) -> None:
        """Choose whether blocks stay gathered, by the bytes that are free beside activations."""


# share of a GPU's memory that a plan leaves free for what it does not know of
UNPLANNED = 0.05


def with_gaps(free: int, working: int, loss: int) -> Room:
    """Room of which gaps between tensors take what a block's way back takes once more.

    Within 12 GiB, filled up to UNPLANNED, the allocator found no place for a block's last tensors (H100).
    """
    return Room(free - working, working, loss)


class Activations:
    """Runs blocks, and decides what of them is run again on the way back.

    Args:
        policy: ``save``: nothing. ``recompute``: all. ``auto``: what does not fit, decided once; see
            :func:`tli_engine.models.arrangement.arrange`. On a CPU nothing is run again.
        largest: Tokens of the largest pack to come; that of the plan's by default.

    Attributes:
        arrangement: What blocks keep; None until ``auto`` has decided.
    """

    def __init__(self, policy: Policy = "auto", largest: int | None = None) -> None:
        self.policy, self.largest = policy, largest
        decided = {"save": EVERYTHING, "recompute": NOTHING, "auto": None}
        self.arrangement: Arrangement | None = decided[policy]

    @property
    def undecided(self) -> bool:
        """Whether :meth:`plan` is to be called before the first way back."""
        return self.arrangement is None

    def plan(
        self,
        blocks: Sequence[Block],
        first: int,
        x: Tensor,
        residual: Tensor | None,
        reserve: Reserve,
        spread: Spread | None = None,
    ) -> None:
        """Measure what the parts of each block keep, by running them, and decide.

        Where weights are spread over GPUs, all of them decide alike, by the fullest, and whether blocks
        stay gathered too; a policy other than ``auto`` is kept to.

        Args:
            blocks: Those from number ``first`` on; the ones below keep nothing.
            first: Number of the lowest.
            x: What it takes.
            residual: What it takes beside.
            reserve: Bytes to leave for what else is made.
            spread: Where the weights lie, if GPUs hold shares of them.
        """
        if not _counts(x.device):
            self.arrangement = self.arrangement or EVERYTHING
            if spread is not None and spread.undecided:
                spread.decide(None)
            return
        # what random numbers a plan draws must not change those of the run
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            kept = _measure(blocks, first, x, residual, spread)
        largest = list if spread is None else spread.largest
        (tokens,) = map(int, largest([max(self.largest or 0, len(x))]))
        kept = [largest([tokens / len(x) * size for size in sizes]) for sizes in kept]
        parts = [
            [Part(int(size), work) for size, work in zip(sizes, b.work, strict=True)]
            for sizes, b in zip(kept, blocks, strict=True)
        ]
        # gradients take as much as what they are of, at the most
        most = max(sum(part.kept for part in of_block) for of_block in parts)
        working = tokens * reserve.block_of_token + reserve.block or most
        loss = reserve.loss + tokens * reserve.loss_of_token
        # the lowest block's input is there already
        (full,) = largest([reserve.states - _free(x.device) - x.nbytes])
        room = with_gaps(int(-full), working, loss)
        size = tokens * (x.nbytes // len(x))
        self.arrangement = self.arrangement or arrange(parts, first, size, room)
        if spread is not None and spread.undecided:
            spread.decide(left(parts, first, size, room, self.arrangement))

    def run(
        self, number: int, block: Block, x: Tensor, residual: Tensor | None, draws: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Run a block by its number; ``draws``: random numbers, which must be the same ones again."""
        arrangement = EVERYTHING if self.arrangement is None else self.arrangement
        keeps = arrangement.keeps(number, len(block.parts))
        if all(keeps) or not torch.is_grad_enabled():
            return block(x, residual)
        if not any(keeps):
            return block.finish(*_again(block.trunk, x, residual, draws))
        for part, keep in zip(block.parts, keeps, strict=True):
            x, residual = part(x, residual) if keep else _again(part, x, residual, draws)
        return block.finish(x, residual)


def _again(
    run: Half, x: Tensor, residual: Tensor | None, draws: bool
) -> tuple[Tensor, Tensor | None]:
    """Run, keep the input alone, and run again on the way back."""
    # one tensor is kept, not two
    h = x if residual is None else x + residual
    out: tuple[Tensor, Tensor | None] = checkpoint(
        *(run, h, None),
        use_reentrant=False,
        preserve_rng_state=draws,
        context_fn=lambda: (nullcontext(), run_again(h.device)),
    )
    return out


def _measure(
    blocks: Sequence[Block], first: int, x: Tensor, residual: Tensor | None, spread: Spread | None
) -> list[list[float]]:
    """Bytes that each part of each block keeps beyond its input."""
    found = []
    h = x if residual is None else x + residual
    for number, block in enumerate(blocks, first):
        with nullcontext() if spread is None else spread.gathered(number):
            kept, h = _measure_block(block, h)
        found.append(kept)
    return found


def _measure_block(block: Block, h: Tensor) -> tuple[list[float], Tensor]:
    """Bytes that each part keeps, and what the block puts out."""
    kept: list[float] = []
    for i, part in enumerate(block.parts):
        h = h.detach().requires_grad_(h.requires_grad)
        before = _allocated(h.device)
        out, residual = part(h, None)
        if i == len(block.parts) - 1:
            out, residual = block.finish(out, residual)
        graph = out.grad_fn, None if residual is None else residual.grad_fn
        following = out.detach() if residual is None else out.detach() + residual.detach()
        following.requires_grad_(out.requires_grad)
        del out, residual
        own = following.nbytes
        kept.append(max(0, _allocated(h.device) - before - own))
        h = following
        del graph
    return kept, h


def _counts(device: torch.device) -> bool:
    """Whether it is known how much memory tensors take there."""
    return device.type == "cuda"


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device)


def _free(device: torch.device) -> int:
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_allocated(device)
    unused = torch.cuda.memory_reserved(device) - held
    # a process may be told to take no more than a share of the card
    total = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return int(min(free + unused, total - held) - UNPLANNED * total)
