"""Notices writes to parameters and buffers that their version counters do not show.

``parameter.data`` gives a tensor with a counter of its own. While a script is watched, setting ``data`` of a
parameter or of a buffer that is looked at, and writing to what reading it gave, count as writes. Possible
ones, which count as well where nothing is lost but a computation, are each reading and each step of an optimizer.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_TENSOR: Any = torch._C.TensorBase
_VERSION = _TENSOR._version.__get__
_EMPTY = torch.empty(0)
_COPIES: Any = torch._has_compatible_shallow_copy_type

# how often :func:`watched` was entered and not left
_depth = 0
_possible = 0
_certain = 0
# by their numbers: tensors compare element by element
_watched: dict[int, "weakref.ref[Tensor]"] = {}
# of a tensor's last certain write its number among them
_last: dict[int, int] = {}


class _Alias:
    """A tensor on a parameter's memory that counts its writes, and those to its views, by itself."""

    def __init__(self, owner: int, value: Tensor) -> None:
        # views keep it alive
        self._value = weakref.ref(value, partial(_end, id(value)))
        # torch swaps no tensor that has weak references
        self.owner = owner
        with torch._C.DisableTorchFunctionSubclass():
            self.counter = value.detach()
            # of the same counter, and without the memory, which may be given up
            if type(self.counter) is Tensor and _COPIES(self.counter, _EMPTY):
                _TENSOR.data.__set__(self.counter, _EMPTY)
        self.version = self.counter._version


_aliases: dict[int, _Alias] = {}


def is_watched() -> bool:
    """Whether the caller is inside :func:`watched`."""
    return _depth > 0


def writes() -> int:
    """Number of possible writes so far, while :func:`watched`."""
    _look_at_aliases()
    return _possible


def certain_writes() -> int:
    """Number of certain writes so far, while :func:`watched`."""
    _look_at_aliases()
    return _certain


def writes_to(tensors: Iterable[Tensor | None], since: int) -> dict[int, int]:
    """Which of them, by their numbers (``id``), were certainly written to after so many such writes, and when last."""
    if certain_writes() == since:
        return {}
    last = {id(tensor): _last.get(id(tensor), 0) for tensor in tensors}
    return {number: write for number, write in last.items() if write > since}


def watch(tensors: Iterable[Tensor]) -> None:
    """Let these count as parameters do."""
    for tensor in tensors:
        _watched[id(tensor)] = weakref.ref(tensor, partial(_forget, id(tensor)))


def _forget(number: int, _: object) -> None:
    _watched.pop(number, None)


def _owner(tensor: Tensor) -> int | None:
    """The number of the tensor that counts, if this is one or an alias of one."""
    if isinstance(tensor, nn.Parameter) or id(tensor) in _watched:
        return id(tensor)
    alias = _aliases.get(id(tensor))
    return None if alias is None else alias.owner


def _count(*args: Any) -> None:
    global _possible
    _possible += 1


def _count_certain(owner: int) -> None:
    global _certain
    _count()
    _certain += 1
    _last[owner] = _certain


def _look_at_aliases() -> None:
    if not _aliases:
        return
    aliases = [*_aliases.values()]
    now = [*map(_VERSION, [alias.counter for alias in aliases])]
    if now != [alias.version for alias in aliases]:
        for alias, version in zip(aliases, now, strict=True):
            if alias.version != version:
                alias.version = version
                _count_certain(alias.owner)


def _end(number: int, _: object) -> None:
    """Count what was written to an alias before it went."""
    alias = _aliases.pop(number, None)
    if alias is not None and alias.counter._version != alias.version:
        _count_certain(alias.owner)


def _note_alias(owner: int, value: Tensor) -> None:
    # tensors of inference mode have no counter
    if not value.is_inference():
        _aliases[id(value)] = _Alias(owner, value)


def _forget_aliases(owner: int) -> None:
    """Of a tensor whose memory is another now: what lay there before is none of it."""
    for number in [*_aliases]:
        alias = _aliases.get(number)
        if alias is not None and alias.owner == owner:
            _aliases.pop(number, None)


@contextmanager
def watched() -> Iterator[None]:
    """Count while inside."""
    global _depth
    outer = torch.Tensor.__dict__.get("data")
    theirs: Any = outer or torch._C.TensorBase.data

    def read(tensor: Tensor) -> Tensor:
        value: Tensor = theirs.__get__(tensor)
        owner = _owner(tensor)
        if owner is not None:
            _count()
            _note_alias(owner, value)
        return value

    def write(tensor: Tensor, value: Tensor) -> None:
        theirs.__set__(tensor, value)
        owner = _owner(tensor)
        if owner is not None:
            _count_certain(owner)
            _forget_aliases(owner)
            _note_alias(owner, value)

    swap: Any = torch.utils.swap_tensors

    @wraps(swap)
    def swap_tensors(one: Tensor, other: Tensor) -> None:
        swap(one, other)
        for owner in map(_owner, (one, other)):
            if owner is not None:
                _count_certain(owner)

    torch.Tensor.data = property(read, write)  # type: ignore[assignment]
    torch.utils.swap_tensors = swap_tensors
    steps = register_optimizer_step_post_hook(_count)
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        steps.remove()
        torch.utils.swap_tensors = swap
        if not _depth:
            _aliases.clear()
        if outer is None:
            # the class has none of its own: TensorBase's shows again
            del torch.Tensor.data
        else:
            torch.Tensor.data = outer
