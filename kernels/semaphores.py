"""Counters by which the programs of one launch find out who comes last, zero before and after it."""

from functools import cache

import torch
from torch import Tensor

# counters of a stream, and of a slab for the launches that graphs capture: 4 MiB
_PER_STREAM = 4096
_PER_SLAB = 1 << 20
# counters of 128 bytes: no two launches share a line
_LINE = 32


class _Slab:
    """Counters for captured launches: a graph may be replayed on any stream, beside any other."""

    def __init__(self, device: torch.device) -> None:
        self.counters = torch.zeros(_PER_SLAB, dtype=torch.int32, device=device)
        self.used = 0

    def take(self, count: int) -> Tensor | None:
        """Counters for one launch; None: there are not so many left."""
        first = self.used
        if first + count > _PER_SLAB:
            return None
        self.used += -(-count // _LINE) * _LINE
        return self.counters[first : first + count]


# the last is in use; graphs know addresses in those before
_slabs: dict[torch.device, list[_Slab]] = {}


@cache
def _of_stream(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(_PER_STREAM, dtype=torch.int32, device=device)


def semaphores(device: torch.device, count: int) -> Tensor:
    """Return ``count`` int32 zeros that no launch in flight shares; the launch must leave zeros.

    Launches of one stream follow one another and share theirs. A captured launch gets its own for
    ever; those of one capture have at least half a slab between them. Past that, and on a GPU that
    was not used before the capture, they get zeros that the graph writes on each replay: a launch more.
    """
    if device.type != "cuda" or count > _PER_STREAM:
        return torch.zeros(count, dtype=torch.int32, device=device)
    slabs = _slabs.setdefault(device, [])
    if not torch.cuda.is_current_stream_capturing():
        # made before a capture: a graph's own memory may be given to others after it
        if not slabs or slabs[-1].used > _PER_SLAB // 2:
            slabs.append(_Slab(device))
        return _of_stream(device, torch.cuda.current_stream(device).cuda_stream)
    taken = slabs[-1].take(count) if slabs else None
    return torch.zeros(count, dtype=torch.int32, device=device) if taken is None else taken
