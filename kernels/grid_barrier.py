"""A barrier among all programs of a launch, all of which must be on the GPU at once.

The counter is zero before a launch and after it, and nobody waits to find out who leaves last: a
program arrives with a weight, all weights sum to 2**10, and leaves with (2**22 - 1) times it, so that
the sum of all wraps to 2**32. While any has yet to leave, the counter, unsigned, is 2**10 or more.
"""

import triton
import triton.language as tl

# at most; more than any GPU has multiprocessors
PROGRAMS = tl.constexpr(1 << 10)
_LEAVING_BITS = tl.constexpr(22)


@triton.jit
def _weight():
    # the first also counts for the programs that the launch does not have
    return 1 + tl.where(tl.program_id(0) == 0, PROGRAMS - tl.num_programs(0), 0)


@triton.jit
def arrive(counter_ptr):
    """Say that what this program has written may be read."""
    # every thread's part is written before one of them says so
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, _weight(), sem="release")


@triton.jit
def wait_and_leave(counter_ptr):
    """Wait until all programs have arrived; the counter returns to zero when all have left."""
    # adding nothing is a load in PTX
    count = tl.atomic_add(counter_ptr, 0, sem="acquire")
    while (count >= 0) & (count < PROGRAMS):
        count = tl.atomic_add(counter_ptr, 0, sem="acquire")
    tl.debug_barrier()
    weight = _weight()
    tl.atomic_add(counter_ptr, (weight << _LEAVING_BITS) - weight, sem="relaxed")
