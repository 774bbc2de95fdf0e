"""Notices writes to parameters that their version counters do not show.

``parameter.data`` gives a tensor with a counter of its own, and some optimizers write through
pointers. While a memo is in use, reading ``data`` of a parameter, setting it, and every step of an
optimizer count as writes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_writes = 0


def writes() -> int:
    """Number of possible writes so far, while :func:`watched`."""
    return _writes


def _count(*args: Any) -> None:
    global _writes
    _writes += 1


@contextmanager
def watched() -> Iterator[None]:
    """Count while inside."""
    outer = torch.Tensor.__dict__.get("data")
    theirs: Any = outer or torch._C.TensorBase.data

    def read(tensor: Tensor) -> Tensor:
        if isinstance(tensor, nn.Parameter):
            _count()
        value: Tensor = theirs.__get__(tensor)
        return value

    def write(tensor: Tensor, value: Tensor) -> None:
        if isinstance(tensor, nn.Parameter):
            _count()
        theirs.__set__(tensor, value)

    torch.Tensor.data = property(read, write)  # type: ignore[assignment]
    steps = register_optimizer_step_post_hook(_count)
    try:
        yield
    finally:
        steps.remove()
        if outer is None:
            # the class has none of its own: TensorBase's shows again
            del torch.Tensor.data
        else:
            torch.Tensor.data = outer
