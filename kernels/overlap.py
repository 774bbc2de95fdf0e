"""Programmatic dependent launch: a kernel is set up while the one before it ends.

Worth 1-2 us a launch on Hopper, which is much of a kernel for few rows.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRET = bool(triton.knobs.runtime.interpret)


@triton.jit
def follow(OVERLAP: tl.constexpr):
    """Let the next kernel be set up, and wait until what the ones before wrote is visible."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()


@cache
def _overlaps(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def overlap(device: torch.device) -> dict[str, bool]:
    """Launch options of a kernel that begins with :func:`follow`."""
    on = not INTERPRET and device.type == "cuda" and _overlaps(device)
    return {"OVERLAP": on, "launch_pdl": on}
