"""NF4 weights of which each rank holds a share of the bytes, gathered block by block."""

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from tli_engine.distributed.world import World
from tli_engine.nn import NF4Linear

# bytes to which each tensor, and each share, is filled up: what kernels' loads want at least
_ALIGNMENT = 256
# the name that it has from PyTorch 2.13 on, and the one before
_gather_bytes: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class ShardedNF4:
    """Blocks of NF4 layers whose stored bytes lie spread over the ranks.

    Two buffers hold the blocks in turns, the even ones in one and the odd ones in the other; while
    one is used, the next one's bytes come. Layers read their block's bytes in place, as the kernels
    lay them out, bit for bit.

    A block is whole from :meth:`fetch` until the next but one is fetched: run it again on the way
    back rather than keep what its layers read. All ranks must fetch the same blocks in the same
    order.

    Attributes:
        nbytes: That this rank holds, buffers included.
    """

    def __init__(self, blocks: Sequence[Sequence[NF4Linear]], world: World) -> None:
        """Take the layers' bytes, leave each rank its share, and give up the rest.

        Args:
            blocks: The layers of each block, lowest first; the same on all ranks.
            world: The ranks.

        Raises:
            ValueError: A layer keeps a dense copy, which is not shared out.
        """
        layers = [layer for block in blocks for layer in block]
        if any(layer.weight_residency != "nf4" for layer in layers):
            raise ValueError("weight_residency must be nf4: a dense copy is not shared out")
        stored = [[t for layer in block for t in layer.stored_tensors()] for block in blocks]
        unit = world.size * _ALIGNMENT
        self._sizes = [_up(sum(_up(t.nbytes, _ALIGNMENT) for t in of), unit) for of in stored]
        self._buffers = [
            torch.zeros(max(self._sizes[turn::2], default=0), dtype=torch.uint8, device=layers[0].device)
            for turn in range(2)
        ]  # fmt: skip
        self._shards = [self._take(number, block, world) for number, block in enumerate(blocks)]
        self._held: list[int | None] = [None, None]
        self._works: list[dist.Work | None] = [None, None]
        self._last = 0
        self._digest = self._digest_now()

    @property
    def nbytes(self) -> int:
        """Bytes that this rank holds, buffers included."""
        return sum(t.nbytes for t in (*self._shards, *self._buffers))

    def fetch(self, block: int) -> None:
        """Wait until a block is whole, and begin to gather the one that is likely to follow."""
        self._gather(block)
        work, self._works[block % 2] = self._works[block % 2], None
        if work is not None:
            work.wait()
        following = block + (1 if block >= self._last else -1)
        if 0 <= following < len(self._shards):
            self._gather(following)
        self._last = block

    def unchanged(self) -> bool:
        """Whether this rank's share is what it was."""
        return self._digest == self._digest_now()

    def _gather(self, block: int) -> None:
        turn = block % 2
        if self._held[turn] == block:
            return
        work = self._works[turn]
        if work is not None:
            work.wait()
        whole = self._buffers[turn][: self._sizes[block]]
        self._works[turn] = _gather_bytes(whole, self._shards[block], async_op=True)
        self._held[turn] = block

    def _take(self, number: int, layers: Sequence[NF4Linear], world: World) -> Tensor:
        """This rank's share of a block, whose layers read the buffer from here on."""
        buffer, start = self._buffers[number % 2], 0
        for layer in layers:
            views = []
            for tensor in layer.stored_tensors():
                view = buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                view.copy_(tensor)
                views.append(view)
                start += _up(tensor.nbytes, _ALIGNMENT)
            layer.set_stored_tensors(views)
        size = self._sizes[number] // world.size
        return buffer[world.rank * size : (world.rank + 1) * size].clone()

    def _digest_now(self) -> str:
        digest = sha256()
        for shard in self._shards:
            digest.update(shard.cpu().numpy().data)
        return digest.hexdigest()


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
