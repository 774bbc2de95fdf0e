"""Counters by which the programs of one launch find out who comes last, zero before and after it."""

from functools import cache

import torch
from torch import Tensor

# counters of a stream, and of a launch that a graph captures; 1 MiB for 256 captured launches
_PER_STREAM = 4096
_PER_LAUNCH = 1024
_CAPTURED = 256


class _Slab:
    """Counters for captured launches: a graph may be replayed on any stream, beside any other."""

    def __init__(self, device: torch.device) -> None:
        self.counters = torch.zeros(_CAPTURED, _PER_LAUNCH, dtype=torch.int32, device=device)
        self.used = 0


_slabs: dict[torch.device, _Slab] = {}


@cache
def _of_stream(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(_PER_STREAM, dtype=torch.int32, device=device)


def semaphores(device: torch.device, count: int) -> Tensor:
    """Return ``count`` int32 zeros that no launch in flight shares; the launch must leave zeros.

    Launches of one stream follow one another and share theirs. A captured launch gets its own for
    ever, while they last; then zeros that the graph writes on each replay.
    """
    if device.type != "cuda" or count > _PER_LAUNCH:
        return torch.zeros(count, dtype=torch.int32, device=device)
    if not torch.cuda.is_current_stream_capturing():
        # made before a capture: a graph's own memory may be given to others after it
        if device not in _slabs:
            _slabs[device] = _Slab(device)
        return _of_stream(device, torch.cuda.current_stream(device).cuda_stream)
    slab = _slabs.get(device)
    if slab is None or slab.used == _CAPTURED:
        return torch.zeros(count, dtype=torch.int32, device=device)
    slab.used += 1
    return slab.counters[slab.used - 1]
