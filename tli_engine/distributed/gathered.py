"""Vectors of all ranks in one tensor, with the gradient of those that are this rank's."""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from tli_engine.distributed.world import World


def share_of(count: int, world: World) -> range:
    """Numbers of ``count`` items that are this rank's: ranks in order, shares as even as can be."""
    return range(world.rank * count // world.size, (world.rank + 1) * count // world.size)


def gather_rows(rows: Tensor, count: int, world: World) -> Tensor:
    """Rows of all ranks.

    Whoever computes a loss of all rows, the same on every rank, has on each the whole gradient of
    its own rows: nothing is sent on the way back.

    Args:
        rows: This rank's, ``[R, D]``: those of :func:`share_of`; of none of them, any rows may be
            given, which are left out and get a gradient of zeros.
        count: Of all, ``N``.
        world: The ranks.

    Returns:
        ``[N, D]``, bit for bit the ranks' own rows.
    """
    if world.size == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows, count, world)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, count: int, world: World) -> Tensor:
        ctx.own, ctx.given = share_of(count, world), len(rows)
        shares = [share_of(count, World(rank, world.size)) for rank in range(world.size)]
        sent = rows.new_zeros(max(map(len, shares)), rows.shape[1])
        sent[: len(ctx.own)] = rows[: len(ctx.own)]
        everyone = [torch.empty_like(sent) for _ in range(world.size)]
        dist.all_gather(everyone, sent)
        return torch.cat([part[: len(s)] for part, s in zip(everyone, shares, strict=True)])

    @staticmethod
    def backward(ctx: Any, dgathered: Tensor) -> tuple[Tensor, None, None]:
        drows = dgathered.new_zeros(ctx.given, dgathered.shape[1])
        drows[: len(ctx.own)] = dgathered[ctx.own.start : ctx.own.stop]
        return drows, None, None
