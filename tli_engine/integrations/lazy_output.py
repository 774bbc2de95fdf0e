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
        found = super().__getitem__(index)
        return tuple(map(_Unread.tensor, found)) if isinstance(found, tuple) else found.tensor()

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
_UNREAD = "_tli_engine_unread"


class LazyOutput:
    """Mixed into a class of transformers' outputs; reading a field computes it.

    An output of transformers holds a field twice, as an attribute and as an item, and setting an attribute
    to ``None`` leaves the item. So which items are pending and which attributes are unread is noted apart.
    """

    def _noted(self, name: str) -> Any:
        return object.__getattribute__(self, "__dict__").get(name, ())

    def _settle(self, name: str) -> None:
        pending: Any = self._noted(_PENDING) or {}
        unread = self._noted(_UNREAD)
        # another thread may have been here
        compute = pending.get(name)
        if compute is None:
            return
        value = compute()
        if name not in pending:
            # set by who computed it, or by another thread
            return
        if value is not None:
            OrderedDict.__setitem__(self, name, value)  # type: ignore[index]
        elif name in self.keys():
            OrderedDict.__delitem__(self, name)  # type: ignore[arg-type]
        if name in unread:
            self.__dict__[name] = value
            unread.discard(name)
        pending.pop(name, None)

    def _settle_all(self) -> None:
        for name in list(self._noted(_PENDING)):
            self._settle(name)

    def _forget(self, name: str, *, item: bool) -> None:
        """Leave an attribute, and its item too, to who sets it."""
        if name in self._noted(_UNREAD):
            self._noted(_UNREAD).discard(name)
        if item and name in self._noted(_PENDING):
            self._noted(_PENDING).pop(name, None)

    def __getattribute__(self, name: str) -> Any:
        if name in object.__getattribute__(self, "__dict__").get(_UNREAD, ()):
            object.__getattribute__(self, "_settle")(name)
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._forget(name, item=value is not None)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        self._forget(name, item=False)

    def __setitem__(self, key: str, value: Any) -> None:
        self._forget(key, item=True)
        super().__setitem__(key, value)  # type: ignore[misc]

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            names: Any = list(self.keys())[key]
            # transformers' own reads every item to find some
            return self[names] if isinstance(names, str) else tuple(self[n] for n in names)
        self._settle(key)
        return OrderedDict.__getitem__(self, key)  # type: ignore[index]

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

    def popitem(self, last: bool = True) -> Any:
        """As of a dictionary; computes everything."""
        self._settle_all()
        return super().popitem(last)  # type: ignore[misc]

    def clear(self) -> None:
        """As of a dictionary, attributes stay; computes everything."""
        self._settle_all()
        super().clear()  # type: ignore[misc]

    def __reduce__(self) -> Any:
        self._settle_all()
        reduced: Any = super().__reduce__()
        _, args, state, *others = reduced
        state = {name: value for name, value in state.items() if name not in (_PENDING, _UNREAD)}
        return type(self).__mro__[2], args, state, *others


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
    if "logits" in names:
        pending["logits"] = part("logits")
    if "last_hidden_state" in names:
        # that of the tuple, as eager outputs have it
        pending["last_hidden_state"] = lambda: read(run.depth)
    if cached:
        pending["past_key_values"] = keys_and_values
    output = lazy_class(theirs)()
    for name in pending:
        OrderedDict.__setitem__(output, name, None)
    output["hidden_states"] = LazyHiddenStates(range(run.depth + 1), read=read)
    output.__dict__[_PENDING], output.__dict__[_UNREAD] = pending, set(pending)
    return output


def is_compiling() -> bool:
    """Whether a call is traced, and has to be run as it is written."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
