"""What blocks keep for the way back: all that they compute, or only their input."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tli_engine.nn import run_again

Policy = Literal["auto", "save", "recompute"]


@dataclass(frozen=True)
class Block:
    """A block on the rows of a pack; its input is the sum of two parts, and so is its output.

    Attributes:
        trunk: All of it, or all but its last layer.
        last: The last layer, of the first part, where its way back needs nothing of its input: it is
            never run again.
    """

    trunk: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
    last: Callable[[Tensor], Tensor] | None = None

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Run the block."""
        return self.finish(*self.trunk(x, residual))

    def finish(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Run the last layer on what the trunk returned."""
        return (x if self.last is None else self.last(x)), residual


# share of a GPU's memory that a plan leaves free: what fragments, and what it does not know of
UNPLANNED = 0.05


class Activations:
    """Runs blocks, and decides which of them are run again on the way back.

    Args:
        policy: ``save``: none. ``recompute``: all. ``auto``: those that do not fit, decided once: the
            top blocks save, which are the first to be free again. On a CPU all save.
        largest: Tokens of the largest pack to come; that of the plan's by default.

    Attributes:
        first_saved: Number of the lowest block that saves; None until ``auto`` has decided.
    """

    def __init__(self, policy: Policy = "auto", largest: int | None = None) -> None:
        self.policy, self.largest = policy, largest
        self.first_saved: int | None = {"save": 0, "recompute": None, "auto": None}[policy]

    @property
    def undecided(self) -> bool:
        """Whether :meth:`plan` is to be called before the first way back."""
        return self.policy == "auto" and self.first_saved is None

    def plan(
        self, blocks: Sequence[Block], first: int, x: Tensor, residual: Tensor | None, reserve: int
    ) -> None:
        """Measure what each block keeps, by running it, and decide.

        Args:
            blocks: Those from number ``first`` on; the ones below keep nothing.
            first: Number of the lowest.
            x: What it takes.
            residual: What it takes beside.
            reserve: Bytes to leave for what is made after the blocks have run.
        """
        if x.device.type != "cuda":
            self.first_saved = 0
            return
        # what random numbers a plan draws must not change those of the run
        with torch.random.fork_rng(devices=[x.device]):
            kept, inputs = _measure(blocks, x, residual)
        scale = 1.0 if self.largest is None else max(1.0, self.largest / len(x))
        kept = [int(scale * size) for size in kept]
        room = _free(x.device) - reserve - int(scale * inputs)
        self.first_saved = first + first_saved(kept, room)

    def run(
        self, number: int, block: Block, x: Tensor, residual: Tensor | None, draws: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Run a block by its number; ``draws``: random numbers, which must be the same ones again."""
        saves = self.first_saved is not None and number >= self.first_saved
        if saves or not torch.is_grad_enabled():
            return block(x, residual)
        # one tensor is kept, not two
        h = x if residual is None else x + residual
        out: tuple[Tensor, Tensor | None] = checkpoint(
            *(block.trunk, h, None),
            use_reentrant=False,
            preserve_rng_state=draws,
            context_fn=lambda: (nullcontext(), run_again(h.device)),
        )
        return block.finish(*out)


def first_saved(kept: Sequence[int], room: int) -> int:
    """Index of the lowest block that saves.

    Args:
        kept: Bytes that each block keeps beyond its input, lowest first.
        room: Bytes there are. If any block is run again, the largest one's are needed for that.
    """
    if sum(kept) <= room:
        return 0
    room -= max(kept)
    lowest = len(kept)
    while lowest > 0 and kept[lowest - 1] <= room:
        lowest -= 1
        room -= kept[lowest]
    return lowest


def _measure(blocks: Sequence[Block], x: Tensor, residual: Tensor | None) -> tuple[list[int], int]:
    """Bytes that each block keeps beyond its input, and bytes of the inputs of all."""
    kept, inputs = [], 0
    h = x if residual is None else x + residual
    for block in blocks:
        h = h.detach().requires_grad_(h.requires_grad)
        before = torch.cuda.memory_allocated(h.device)
        out, residual = block(h, None)
        graph = out.grad_fn, None if residual is None else residual.grad_fn
        inputs += h.nbytes
        following = out.detach() if residual is None else out.detach() + residual.detach()
        following.requires_grad_(out.requires_grad)
        del out, residual
        own = 0 if graph == (None, None) else following.nbytes
        kept.append(max(0, torch.cuda.memory_allocated(h.device) - before - own))
        h = following
        del graph
    return kept, inputs


def _free(device: torch.device) -> int:
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_allocated(device)
    unused = torch.cuda.memory_reserved(device) - held
    # a process may be told to take no more than a share of the card
    total = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return int(min(free + unused, total - held) - UNPLANNED * total)
