"""What a model's modules hold beside parameters, children and modes, as far as a result depends on it.

Knock-outs and the like are attributes: a module's own ``forward``, another scaling, a buffer that was
written to, a number in the configuration. Most of it is compared by passes of C, object by object.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from copy import copy
from itertools import chain
from operator import is_, itemgetter
from typing import Any

from torch import Tensor, nn

from tli_engine.integrations.held_code import Code, Configs, is_known
from tli_engine.integrations.same_objects import PLAIN, versions
from tli_engine.integrations.weight_writes import watch

# what every module has, and what is looked at elsewhere
_ELSEWHERE = frozenset((*nn.Module().__dict__, "_disable_adapters", "_active_adapter"))
# what libraries note, as they run for the most part, and what results do not depend on
_NOTES = frozenset(
    (
        "_is_hf_initialized",
        "compute_type_is_set",
        "gradient_checkpointing",
        "_gradient_checkpointing_func",
        "warnings_issued",
    )
)
# children that stand-ins are there for while a call is noted
_STOOD_IN = frozenset(("layers", "model", "norm"))
_NOT_HERE = _ELSEWHERE | _NOTES | _STOOD_IN
# what these say of themselves changes nothing: their weights do
_SIZES = frozenset(("in_features", "out_features"))
# what only holds others has no forward
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class HeldState:
    """What modules held at one time.

    Args:
        modules: In the order of ``model.modules()``.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._own = frozenset(map(id, modules))
        self._numbers = [i for i, m in enumerate(modules) if type(m) not in CONTAINERS]
        self._modules = [modules[i] for i in self._numbers]
        self._dicts = [m.__dict__ for m in self._modules]
        # modules of torch.jit have none there
        self._buffers = [d.get("_buffers", {}) for d in self._dicts]
        self._look()

    def _look(self) -> None:
        self._types, self._sizes = [*map(type, self._modules)], [*map(len, self._dicts)]
        names = [*map(_names, self._modules)]
        self._held = [{n: d[n] for n in some} for some, d in zip(names, self._dicts, strict=True)]
        groups: dict[tuple[str, ...], list[int]] = {}
        for number, some in enumerate(names):
            if some:
                groups.setdefault(some, []).append(number)
        self._alike = [_Alike(some, group, self._dicts) for some, group in groups.items()]
        containers = [
            (number, v, copy(v))
            for number, held in enumerate(self._held)
            for v in held.values()
            if isinstance(v, (dict, list, set))
        ]
        self._container_numbers = [number for number, _, _ in containers]
        self._containers = [container for _, container, _ in containers]
        self._contents = [content for _, _, content in containers]
        self._look_at_tensors()
        self._quantised = _Quantised(self._dicts)
        self._code, self._configs = Code(self._modules, at_call=True), Configs(self._modules)
        self._foreign: dict[str | None, str | None] = {}

    def _look_at_tensors(self) -> None:
        """Buffers, and tensors that are plain attributes, with how often each was written to."""
        self._tensors: list[Tensor | None] = []
        self._starts = [0]
        # rotary embeddings have some, and hardly another module
        self._with_buffers = [i for i, buffers in enumerate(self._buffers) if buffers]
        self._filled = [self._buffers[i] for i in self._with_buffers]
        self._empty = [buffers for buffers in self._buffers if not buffers]
        self._buffer_sizes = [*map(len, self._filled)]
        for buffers, held in zip(self._buffers, self._held, strict=True):
            self._tensors += [*buffers.values()]
            self._tensors += [v for v in held.values() if isinstance(v, Tensor)]
            self._starts.append(len(self._tensors))
        self._versions = versions(self._tensors)
        self._held_buffers = [*_values(self._filled)]
        watch([t for t in self._tensors if t is not None])

    def is_same(self) -> bool:
        """Whether all modules hold what they held."""
        if self._is_same_at_once(len(self._dicts)):
            return True
        if self.change(self._numbers[-1] + 1) is not None:
            return False
        # something else was noted on them: looked at anew, they are compared at once again
        self._look()
        return True

    @property
    def is_counted(self) -> bool:
        """Whether writes to all buffers are counted; to those of inference mode they are not."""
        return -1 not in self._versions

    def tensors(self, count: int) -> list[Tensor | None]:
        """Buffers, and tensors that are plain attributes, of the first ``count`` modules."""
        return self._tensors[: self._starts[bisect_left(self._numbers, count)]]

    def foreign(self, attention: str | None) -> str | None:
        """The name of something that runs and that no known library wrote: it may have state of its own.

        Args:
            attention: The way to attend that is in use.
        """
        if attention not in self._foreign:
            code = self._code
            found = code.foreign_class() or code.foreign(attention) or self._foreign_attribute()
            self._foreign[attention] = found
        return self._foreign[attention]

    def _foreign_attribute(self) -> str | None:
        """What somebody put on a module, a ``forward`` for the most part."""
        for type_, held in zip(self._types, self._held, strict=True):
            for name, value in held.items():
                if isinstance(value, (type, Tensor, nn.Module)):
                    continue
                # accelerate's hooks run in its forward
                called = getattr(value, "hooks", [value]) if name == "_hf_hook" else [value]
                for each in called:
                    if (callable(each) or name == "_hf_hook") and not is_known(each, self._own):
                        return f"{type_.__name__}'s {name}"
        return None

    def change(self, count: int) -> str | None:
        """What is another now, in words, of the first ``count`` modules; ``None``: nothing."""
        count = bisect_left(self._numbers, count)
        if self._is_same_at_once(count):
            return None
        for number in range(count):
            change = self._change_of(number)
            if change is not None:
                return f"{self._types[number].__name__}'s {change}"
        if not self._quantised.is_same(count):
            return "a weight's statistics"
        return self._code.change() or self._configs.change()

    def are_modules_same(self) -> bool:
        """As :meth:`is_same`, but for functions and configurations; may take what is as it was for changed."""
        return self._are_modules_same(len(self._dicts))

    def _is_same_at_once(self, count: int) -> bool:
        """As :meth:`is_same`, of the first ``count`` that are called; may take what is as it was for changed."""
        return self._are_modules_same(count) and self._code.is_same() and self._configs.is_same()

    def _are_modules_same(self, count: int) -> bool:
        tensors = self._tensors[: self._starts[count]]
        containers = bisect_left(self._container_numbers, count)
        filled = bisect_left(self._with_buffers, count)
        try:
            return (
                [*map(type, self._modules[:count])] == self._types[:count]
                and [*map(len, self._dicts[:count])] == self._sizes[:count]
                and all(group.is_same(count) for group in self._alike)
                and self._containers[:containers] == self._contents[:containers]
                and not any(self._empty[: count - filled])
                and [*map(len, self._filled[:filled])] == self._buffer_sizes[:filled]
                and all(map(is_, _values(self._filled[:filled]), self._held_buffers))
                and versions(tensors) == self._versions[: len(tensors)]
                and self._quantised.is_same(count)
            )
        except (KeyError, RuntimeError, ValueError):
            # an attribute is gone, or tensors or arrays would be compared number by number
            return False

    def _change_of(self, number: int) -> str | None:
        module, held = self._modules[number], self._held[number]
        if type(module) is not self._types[number]:
            return "class"
        names = _names(module)
        if names != tuple(held):
            return ", ".join(sorted({*names} ^ {*held})) or "attributes"
        for name, was in held.items():
            if not _is_as_it_was(was, module.__dict__[name]):
                return name
        first, last = self._starts[number : number + 2]
        own = [*self._buffers[number].values(), *(v for v in held.values() if _is_tensor(v))]
        tensors = self._tensors[first:last]
        if len(own) != len(tensors) or not all(map(is_, own, tensors)):
            return "buffers"
        if versions(tensors) != self._versions[first:last]:
            return "buffers"
        return self._change_inside(number)

    def _change_inside(self, number: int) -> str | None:
        first = bisect_left(self._container_numbers, number)
        last = bisect_left(self._container_numbers, number + 1)
        names = [n for n, v in self._held[number].items() if isinstance(v, (dict, list, set))]
        for i, name in zip(range(first, last), names, strict=True):
            try:
                if self._containers[i] != self._contents[i]:
                    return name
            except (RuntimeError, ValueError):
                return name
        return None


class _Alike:
    """Modules with attributes of the same names."""

    def __init__(
        self, names: tuple[str, ...], numbers: list[int], dicts: Sequence[dict[str, Any]]
    ) -> None:
        # of one name it gives no tuple
        self._get: Any = itemgetter(*names, names[0])
        self._numbers, self._dicts = numbers, [dicts[number] for number in numbers]
        self._values = [*chain.from_iterable(map(self._get, self._dicts))]

    def is_same(self, count: int) -> bool:
        """Whether those among the first ``count`` of the model have the same values."""
        some = self._dicts[: bisect_left(self._numbers, count)]
        return all(map(is_, chain.from_iterable(map(self._get, some)), self._values))


class _Quantised:
    """Statistics of 4-bit weights, which parameters of bitsandbytes have beside their bytes."""

    def __init__(self, dicts: Sequence[dict[str, Any]]) -> None:
        self._numbers: list[int] = []
        self._parameters: list[dict[str, Any]] = []
        for number, d in enumerate(dicts):
            for parameter in d.get("_parameters", {}).values():
                if getattr(parameter, "__dict__", {}).get("quant_state") is not None:
                    self._numbers.append(number)
                    self._parameters.append(parameter.__dict__)
        self._states, self._values = self._look(len(self._parameters))
        self._versions = versions(self._values)

    def is_same(self, count: int) -> bool:
        """Whether those of the first ``count`` modules are what they were."""
        some = bisect_left(self._numbers, count)
        try:
            states, values = self._look(some)
        except (AttributeError, KeyError):
            # a parameter has none any more
            return False
        return (
            all(map(is_, states, self._states))
            and all(map(is_, values, self._values))
            and versions(values) == self._versions[: len(values)]
        )

    def _look(self, count: int) -> tuple[list[Any], list[Tensor | None]]:
        """Of each parameter its state, and as many tensors: of fewer they are the first."""
        states = [*map(_QUANT_STATE, self._parameters[:count])]
        tensors: list[Tensor | None] = []
        for state in states:
            # of doubly quantised ones, what statistics are made of
            inner = state.state2
            tensors += (state.absmax, state.offset, None if inner is None else inner.absmax)
        return states, tensors


_QUANT_STATE = itemgetter("quant_state")


def _names(module: nn.Module) -> tuple[str, ...]:
    """Attributes that are looked at."""
    from transformers import PreTrainedModel

    names = [n for n in module.__dict__ if n not in _NOT_HERE and not n.startswith("_tli_engine_")]
    if isinstance(module, PreTrainedModel):
        # whole models have notes of their library's, of what was set up or warned of
        names = [name for name in names if not name.startswith("_")]
    if type(module) is nn.Linear:
        names = [name for name in names if name not in _SIZES]
    if module.__dict__.get("compute_type_is_set") is False:
        # a 4-bit layer takes it from its first input
        names.remove("compute_dtype")
    return tuple(sorted(names))


def _is_as_it_was(was: object, now: object) -> bool:
    return was is now or (type(was) is type(now) and type(was) in PLAIN and was == now)


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _values(dicts: Iterable[dict[str, Any]]) -> Iterable[object]:
    return chain.from_iterable(map(dict.values, dicts))
