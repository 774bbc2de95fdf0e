"""What modules share: the functions of their classes, and the model's configuration."""

import sys
from collections.abc import Hashable, Iterable, Mapping
from types import FunctionType
from typing import Any

from torch import nn

from tli_engine.integrations.same_objects import are_identical

# what every module is called by, wherever in its classes it stands
_CALLED = ("forward", "__call__")
# whose code is looked at function by function: what a block's modules do is written there
_MODELS = "transformers.models."
# whose functions stand where they wrote them
_LIBRARIES = frozenset(("bitsandbytes", "peft", "tli_engine", "torch", "transformers"))
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


class Code:
    """Functions that modules run, as their classes and the files of these hold them.

    Args:
        modules: Whose.

    Attributes:
        found: They, in an order of their own for the classes of these modules.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        classes = dict.fromkeys(
            c for t in dict.fromkeys(map(type, modules)) for c in t.__mro__[:-1]
        )
        spaces: list[Mapping[str, Any]] = [vars(c) for c in classes]
        self._places = [(space, name) for space in spaces for name in _CALLED]
        own = [c for c in classes if c.__module__.startswith(_MODELS)]
        files = dict.fromkeys(c.__module__ for c in own)
        spaces = [vars(c) for c in own] + [vars(sys.modules[file]) for file in files]
        self._places += [(s, n) for s in spaces for n, v in s.items() if type(v) is FunctionType]
        self._places += [(ALL_ATTENTION_FUNCTIONS, name) for name in ALL_ATTENTION_FUNCTIONS]
        self.found = self._look()

    def is_same(self) -> bool:
        """Whether they are what they were."""
        return are_identical(self._look(), self.found)

    def change(self) -> str | None:
        """The name of one that is another now."""
        for (_, name), was, now in zip(self._places, self.found, self._look(), strict=True):
            if was is not now:
                return f"a class's or a file's {name}"
        return None

    def foreign(self) -> str | None:
        """The name of one that another library, or a script, put in the place of its own."""
        for (_, name), function in zip(self._places, self.found, strict=True):
            if function is not None and not _is_known(function):
                return name
        return None

    def _look(self) -> list[object]:
        return [space.get(name) for space, name in self._places]


def _is_known(function: object) -> bool:
    file = str(getattr(function, "__globals__", {}).get("__name__"))
    library = file.partition(".")[0]
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
