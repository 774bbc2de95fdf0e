"""A sum whose parts come from several programs of one launch: the last to arrive adds them, in order.

Parts are added in groups of 16, then the groups': one program would take long over a hundred. Equal
inputs give equal bits, whoever is last.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tli_engine.kernels.semaphores import semaphores

# counters of one sum: of up to 63 groups of parts, then of the groups
LOCKS = tl.constexpr(64)
_MAX_SPLIT = 128
# parts of a group
_GROUP = tl.constexpr(16)


@triton.jit
def arrives_last(lock_ptr, count):
    """Count this program in; whether all have come, in which case the counter is zero again."""
    # every thread's part is written before one of them says so
    tl.debug_barrier()
    is_last = tl.atomic_add(lock_ptr, 1, sem="acq_rel") == count - 1
    if is_last:
        tl.store(lock_ptr, 0)
    return is_last


@triton.jit
def add_parts(part_ptr, offs, keep, stride, count: tl.constexpr):
    """Sum of so many parts, in order; read from the L2 cache, where other programs' are."""
    total = tl.load(part_ptr + offs, mask=keep, other=0.0, cache_modifier=".cg")
    for i in tl.static_range(1, count):
        total += tl.load(part_ptr + i * stride + offs, mask=keep, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def sum_of_parts(acc, part_ptr, lock_ptr, part, offs, keep, stride, SPLIT: tl.constexpr):
    """Give up ``acc``; return the sum of all parts and True to the last program, False to others.

    Part ``i`` is kept at ``part_ptr + i * stride + offs``.
    """
    is_last = part >= 0
    if SPLIT > 1:
        GROUP: tl.constexpr = SPLIT if SPLIT < _GROUP else _GROUP
        GROUPS: tl.constexpr = SPLIT // GROUP
        tl.store(part_ptr + part * stride + offs, acc, mask=keep)
        group = part // GROUP
        first = group * GROUP
        is_last = arrives_last(lock_ptr + group, GROUP)
        if is_last:
            acc = add_parts(part_ptr + first * stride, offs, keep, stride, GROUP)
        if GROUPS > 1 and is_last:
            # its members are done with the first of their parts
            tl.store(part_ptr + first * stride + offs, acc, mask=keep)
            is_last = arrives_last(lock_ptr + (LOCKS - 1), GROUPS)
            if is_last:
                acc = add_parts(part_ptr, offs, keep, stride * GROUP, GROUPS)
    return acc, is_last


def arrivals(device: torch.device, sums: int) -> Tensor:
    """Counters for so many sums of one launch, ``LOCKS`` each."""
    return semaphores(device, sums * LOCKS.value)


def split_for(programs: int, steps: int, many_steps: int = 8) -> int:
    """Parts, a power of two, that give each multiprocessor of a large GPU about one program.

    At most 16, which are added up at once, unless a program would then have more than ``many_steps``:
    each level of adding up is two trips to the L2 cache, about 2 us (H100).
    """
    group: int = _GROUP.value
    most = group if steps <= many_steps * group else _MAX_SPLIT
    split = 1
    while split < most and programs * split < 2 * 64 and steps >= 2 * split:
        split *= 2
    return split
