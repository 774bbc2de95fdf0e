"""Notices writes to parameters and buffers that their version counters do not show.

``parameter.data`` gives a tensor with a counter of its own, and some optimizers write through
pointers. While a memo is in use, reading ``data`` of a parameter or of a buffer that is looked at,
setting it, and every step of an optimizer count as writes.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_writes = 0
# by their numbers: tensors compare element by element
_watched: dict[int, "weakref.ref[Tensor]"] = {}


def writes() -> int:
    """Number of possible writes so far, while :func:`watched`."""
    return _writes


def watch(tensors: Iterable[Tensor]) -> None:
    """Let these count as parameters do."""
    for tensor in tensors:
        _watched[id(tensor)] = weakref.ref(tensor, partial(_forget, id(tensor)))


def _forget(number: int, _: object) -> None:
    _watched.pop(number, None)


def _counts(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) or id(tensor) in _watched


def _count(*args: Any) -> None:
    global _writes
    _writes += 1


@contextmanager
def watched() -> Iterator[None]:
    """Count while inside."""
    outer = torch.Tensor.__dict__.get("data")
    theirs: Any = outer or torch._C.TensorBase.data

    def read(tensor: Tensor) -> Tensor:
        if _counts(tensor):
            _count()
        value: Tensor = theirs.__get__(tensor)
        return value

    def write(tensor: Tensor, value: Tensor) -> None:
        if _counts(tensor):
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
