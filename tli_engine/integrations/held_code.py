"""What modules share: the functions of their classes, those that these call, and the configuration."""

import sys
from collections.abc import Container, Hashable, Iterable, Mapping
from functools import partial
from itertools import chain
from operator import itemgetter
from types import FunctionType
from typing import Any

from torch import nn

from tli_engine.integrations.same_objects import PLAIN

# what every module is called by, wherever in its classes it stands
_CALLED = ("forward", "__call__")
# whose code is looked at function by function: what a block's modules do is written there
_MODELS = "transformers.models."
# whose functions do the same always: they have no state but what their modules hold
_LIBRARIES = frozenset(
    ("accelerate", "bitsandbytes", "peft", "tli_engine", "torch", "transformers")
)
# what models call of torch by the name of its file
_TORCH = {
    "torch": ("baddbmm", "bmm", "cat", "matmul", "rsqrt", "softmax"),
    "torch.nn.functional": (
        *("dropout", "embedding", "gelu", "layer_norm", "linear", "pad", "relu", "rms_norm"),
        *("scaled_dot_product_attention", "sigmoid", "silu", "softmax", "tanh"),
    ),
}
# what they do once a call, before the first block
_AT_CALL = ("transformers.masking_utils", "transformers.modeling_rope_utils")
# settled at each call, or looked at by itself
_OF_CALLS = frozenset(
    (
        "_attn_implementation_internal",
        "_output_attentions",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "use_cache",
    )
)

Space = Mapping[str, Any]


class Code:
    """Functions that modules run, as their classes, the files of these, attention and torch hold them.

    Args:
        modules: Whose.
        at_call: Those that make masks and angles, too.

    Attributes:
        found: They, in an order of their own for the classes of these modules.
    """

    def __init__(self, modules: Iterable[nn.Module], *, at_call: bool = False) -> None:
        self._classes = dict.fromkeys(
            c for t in dict.fromkeys(map(type, modules)) for c in t.__mro__[:-1]
        )
        places: list[tuple[Space, Iterable[str]]] = [(vars(c), _CALLED) for c in self._classes]
        own = [c for c in self._classes if c.__module__.startswith(_MODELS)]
        files = dict.fromkeys(c.__module__ for c in own)
        self._attention = _attention_functions()
        names = dict.fromkeys(chain.from_iterable(self._attention))
        for function in chain.from_iterable(map(dict.values, self._attention)):
            if _library(function) == "transformers":
                files[function.__module__] = None
        files |= dict.fromkeys(_AT_CALL if at_call else ())
        spaces: list[Space] = [vars(c) for c in own]
        spaces += [vars(sys.modules[file]) for file in files if file in sys.modules]
        places += [(s, [n for n, v in s.items() if type(v) is FunctionType]) for s in spaces]
        places += [(vars(sys.modules[file]), functions) for file, functions in _TORCH.items()]
        # judged by themselves: only one of them runs
        self._first_attention = sum(len([*some]) for _, some in places)
        places += [(space, names) for space in self._attention]
        self._places = [(space, tuple(some)) for space, some in places]
        self.found = self._look()
        self._sizes = [*map(len, self._attention)]
        # tuples are compared by identity first, and by passes of C
        there = [(s, tuple(n for n in some if n in s)) for s, some in self._places]
        getters = [(s, itemgetter(*some, some[0])) for s, some in there if some]
        self._present = [(space, get, get(space)) for space, get in getters]
        self._absent = [(s, n) for s, some in self._places for n in some if n not in s]

    def is_same(self) -> bool:
        """Whether they are what they were, and no other way to attend was registered."""
        try:
            if not all(get(space) == found for space, get, found in self._present):
                return False
        except KeyError:
            return False
        grown = any(name in space for space, name in self._absent)
        return not grown and [*map(len, self._attention)] == self._sizes

    def change(self) -> str | None:
        """The name of one that is another now."""
        for name, was, now in zip(self._names(), self.found, self._look(), strict=True):
            if was is not now:
                return f"a class's or a file's {name}"
        return None

    def foreign(self, attention: str | None = None) -> str | None:
        """The name of one that another library, or a script, put in the place of its own.

        Args:
            attention: Of all ways to attend only this one is looked at; ``None``: all.
        """
        for number, (name, function) in enumerate(zip(self._names(), self.found, strict=True)):
            if number >= self._first_attention and attention not in (None, name):
                continue
            if function is not None and not is_known(function):
                return name
        return None

    def foreign_class(self) -> str | None:
        """The name of a class that is another library's or a script's."""
        return next((c.__name__ for c in self._classes if not _is_library(c.__module__)), None)

    def _names(self) -> Iterable[str]:
        return chain.from_iterable(names for _, names in self._places)

    def _look(self) -> list[object]:
        return [*chain.from_iterable(map(space.get, names) for space, names in self._places)]


def _attention_functions() -> list[dict[str, Any]]:
    """The ways to attend that transformers has, those first that go before others."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS

    return [FUNCTIONS._local_mapping, FUNCTIONS._global_mapping]


def is_known(function: object, own: Container[int] | None = None) -> bool:
    """Whether a function, and what it wraps, is of a library whose functions do the same always.

    Args:
        function: Anything that is called.
        own: Numbers (``id``) of the modules whose methods it may be; ``None``: of any.
    """
    bound_to = getattr(function, "__self__", None)
    if own is not None and isinstance(bound_to, nn.Module) and id(bound_to) not in own:
        return False
    if isinstance(function, partial):
        given = (*function.args, *function.keywords.values())
        if not all(type(value) in PLAIN or (own and id(value) in own) for value in given):
            return False
        function = function.func
    wrapped = getattr(function, "__wrapped__", None)
    return _is_library(_library(function)) and (wrapped is None or is_known(wrapped, own))


def _library(function: Any) -> str:
    """The library that a function was written in."""
    file = getattr(function, "__globals__", {}).get("__name__")
    file = file or getattr(function, "__module__", None) or type(function).__module__
    return str(file).partition(".")[0]


def _is_library(name: str) -> bool:
    library = name.partition(".")[0]
    return library in _LIBRARIES or library in sys.stdlib_module_names


class Configs:
    """Configurations that modules hold, value by value."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        from transformers import PretrainedConfig

        held = [v for m in modules for v in m.__dict__.values() if isinstance(v, PretrainedConfig)]
        self._configs = [vars(config) for config in {id(v): v for v in held}.values()]
        self._copies = [_copy(config) for config in self._configs]

    def is_same(self) -> bool:
        """Whether they say what they said; what is settled at each call does not count."""
        try:
            # at once, as all is at nearly every call
            if self._configs == self._copies:
                return True
        except (RuntimeError, ValueError):
            # arrays would be compared number by number
            pass
        return self.change() is None

    def frozen(self) -> Hashable:
        """What they said, as part of a key."""
        return tuple(
            (name, _freeze(value))
            for copy in self._copies
            for name, value in copy.items()
            if name not in _OF_CALLS
        )

    def change(self) -> str | None:
        """The name of a value that is another now."""
        for config, copy in zip(self._configs, self._copies, strict=True):
            for name in sorted((config.keys() | copy.keys()) - _OF_CALLS):
                if name not in config or name not in copy or not _is_same(config[name], copy[name]):
                    return f"the configuration's {name}"
        return None


def _copy(value: Any) -> Any:
    """A value whose containers are others, and what they hold the same."""
    if isinstance(value, dict):
        return {name: _copy(v) for name, v in value.items()}
    if isinstance(value, set):
        return set(value)
    return type(value)(map(_copy, value)) if type(value) in (list, tuple) else value


def _is_same(value: Any, copy: Any) -> bool:
    """Whether a value is what was copied; of what cannot be compared, whether it is the same object."""
    if value is copy:
        return True
    if isinstance(value, dict) and isinstance(copy, dict):
        return value.keys() == copy.keys() and all(_is_same(v, copy[n]) for n, v in value.items())
    if type(value) in (list, tuple):
        return (
            type(copy) is type(value)
            and len(value) == len(copy)
            and all(map(_is_same, value, copy))
        )
    try:
        return bool(value == copy)
    except (RuntimeError, ValueError):
        return False


def _freeze(value: Any) -> Hashable:
    """A hashable form of a value; of what has none, the object itself."""
    if isinstance(value, dict):
        return tuple((name, _freeze(v)) for name, v in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_freeze, value))
    if isinstance(value, (set, frozenset)):
        return frozenset(map(_freeze, value))
    # by its number: the copies hold it
    return value if isinstance(value, Hashable) else id(value)
