"""A model's output whose parts are computed when they are read."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from tli_engine.integrations.lazy_run import LazyRun


class _Unread:
    """Stands for a hidden state inside the tuple, where C code may look past ``__getitem__``."""

    def __init__(self, read: Callable[[int], Tensor], k: int) -> None:
        self._read, self._k = read, k

    def tensor(self) -> Tensor:
        """The hidden state."""
        return self._read(self._k)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = _pytree.tree_map_only(
            _Unread, _Unread.tensor, (list(map(_plain, args)), kwargs or {})
        )
        return func(*read[0], **read[1])


def _plain(argument: Any) -> Any:
    return tuple(argument) if isinstance(argument, LazyHiddenStates) else argument


class LazyHiddenStates(tuple[Tensor, ...]):
    """``hidden_states`` of a run: a tuple whose items are computed when they are read.

    A slice, a sum or a copy is a plain tuple of tensors.
    """

    def __new__(cls, values: Any = (), *, read: Callable[[int], Tensor] | None = None) -> Any:
        """``values`` are numbers for ``read``; without it, the result is a plain tuple of them."""
        if read is None:
            return tuple(values)
        states = super().__new__(cls, (_Unread(read, k) for k in values))  # type: ignore[misc]
        states._read = read
        return states

    _read: Callable[[int], Tensor]

    def __getitem__(self, index: Any) -> Any:
        numbers = range(len(self))[index]
        if isinstance(numbers, int):
            return self._read(numbers)
        return tuple(map(self._read, numbers))

    def __iter__(self) -> Iterator[Tensor]:
        return map(self._read, range(len(self)))

    def __add__(self, other: Any) -> Any:
        return tuple(self) + tuple(other)

    def __radd__(self, other: Any) -> Any:
        return tuple(other) + tuple(self)

    def __mul__(self, times: Any) -> Any:
        return tuple(self) * times

    __rmul__ = __mul__

    def __eq__(self, other: object) -> bool:
        return self is other or tuple(self) == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __contains__(self, value: object) -> bool:
        return value in tuple(self)

    def index(self, *args: Any) -> int:
        """As of a tuple."""
        return tuple(self).index(*args)

    def count(self, value: Any) -> int:
        """As of a tuple."""
        return tuple(self).count(value)

    def __repr__(self) -> str:
        return repr(tuple(self))

    def __reduce__(self) -> Any:
        return tuple, (list(self),)


_pytree.register_pytree_node(
    LazyHiddenStates, lambda states: (list(states), None), lambda values, _: tuple(values)
)

_PENDING = "_tli_engine_pending"


class LazyOutput:
    """Mixed into a class of transformers' outputs; reading a field computes it."""

    def _settle(self, name: str) -> None:
        pending: Any = object.__getattribute__(self, "__dict__").get(_PENDING)
        if pending and name in pending:
            value = pending[name]()
            del pending[name]
            if value is None:
                OrderedDict.__delitem__(self, name)  # type: ignore[arg-type]
                self.__dict__[name] = None
            else:
                self[name] = value

    def _settle_all(self) -> None:
        for name in list(self.__dict__.get(_PENDING, ())):
            self._settle(name)

    def __getattribute__(self, name: str) -> Any:
        if name in object.__getattribute__(self, "__dict__").get(_PENDING, ()):
            object.__getattribute__(self, "_settle")(name)
        return super().__getattribute__(name)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int):
            key = list(self.keys())[key]
        if isinstance(key, str):
            self._settle(key)
            # transformers' own reads every item to find one
            return OrderedDict.__getitem__(self, key)  # type: ignore[index]
        self._settle_all()
        return super().__getitem__(key)  # type: ignore[misc]

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dictionary."""
        known: Any = self.keys()
        return self[key] if key in known else default

    def items(self) -> Any:
        """As of a dictionary; computes everything."""
        self._settle_all()
        return super().items()  # type: ignore[misc]

    def values(self) -> Any:
        """As of a dictionary; computes everything."""
        self._settle_all()
        return super().values()  # type: ignore[misc]

    def __reduce__(self) -> Any:
        self._settle_all()
        names = (field.name for field in fields(self))  # type: ignore[arg-type]
        return type(self).__mro__[2], tuple(getattr(self, name) for name in names)


@cache
def lazy_class(theirs: type) -> type:
    """The lazy class of outputs that are instances of ``theirs``."""
    return dataclass(type(theirs.__name__, (LazyOutput, theirs), {"__module__": theirs.__module__}))


def lazy_output(
    theirs: type, run: LazyRun, read: Callable[[int], Tensor], *, labels: bool, cached: bool
) -> Any:
    """Make the output of a call.

    Args:
        theirs: The class of output that the model returns.
        run: The call.
        read: Gives a hidden state by its number.
        labels: Whether there is a loss.
        cached: Whether there are keys and values.
    """
    names = {field.name for field in fields(theirs)}
    found: dict[str, Any] = {}

    def part(name: str) -> Callable[[], Any]:
        def compute() -> Any:
            if not found:
                found["output"] = run.finish()
            return getattr(found["output"], name)

        return compute

    def keys_and_values() -> Any:
        return run.run_eagerly(output_hidden_states=False, use_cache=True).past_key_values

    pending: dict[str, Callable[[], Any]] = {}
    if labels and "loss" in names:
        pending["loss"] = part("loss")
    for name in ("last_hidden_state", "logits"):
        if name in names:
            pending[name] = part(name)
    if cached:
        pending["past_key_values"] = keys_and_values
    output = lazy_class(theirs)()
    for name in pending:
        OrderedDict.__setitem__(output, name, None)
    output["hidden_states"] = LazyHiddenStates(range(run.depth + 1), read=read)
    output.__dict__[_PENDING] = pending
    return output


def is_compiling() -> bool:
    """Whether a call is traced, and has to be run as it is written."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
