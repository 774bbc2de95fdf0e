"""The barrier's counter; in the interpreter a launch's programs run in order, so in two launches."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")
import triton
from triton import language as tl

from tli_engine.kernels.grid_barrier import PROGRAMS, arrive, wait_and_leave


@triton.jit
def _arrive_kernel(counter_ptr):
    arrive(counter_ptr)


@triton.jit
def _leave_kernel(counter_ptr, seen_ptr):
    tl.store(seen_ptr + tl.program_id(0), tl.load(counter_ptr))
    wait_and_leave(counter_ptr)


@pytest.mark.parametrize("programs", [1, 2, 5, 132, 1024])
def test_nobody_waits_once_all_have_come_and_the_counter_ends_at_zero(
    programs: int, device: torch.device
) -> None:
    counter = torch.zeros(1, dtype=torch.int32, device=device)
    seen = torch.zeros(programs, dtype=torch.int32, device=device)
    for _ in range(2):
        _arrive_kernel[(programs,)](counter)
        assert counter.item() == PROGRAMS.value
        # would hang if a program that comes after others have left took it for too few
        _leave_kernel[(programs,)](counter, seen)
        assert counter.item() == 0
        # unsigned, as all of the program's predecessors have left
        assert (seen.long() % 2**32 >= PROGRAMS.value).all()


@given(data=st.data(), programs=st.integers(1, 1024))
def test_the_counter_tells_whether_all_have_come(data: st.DataObject, programs: int) -> None:
    """Any order of arrivals and of leavings, in the kernel's arithmetic."""
    weights = [1 + 1024 - programs] + [1] * (programs - 1)
    counter = 0
    for i in data.draw(st.permutations(range(programs))):
        assert 0 <= counter < 1024
        counter += weights[i]
    for i in data.draw(st.permutations(range(programs))):
        assert not 0 <= signed(counter) < 1024
        counter += (weights[i] << 22) - weights[i]
    assert signed(counter) == 0


def signed(counter: int) -> int:
    """As int32."""
    return (counter + 2**31) % 2**32 - 2**31
