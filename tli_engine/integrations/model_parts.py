"""The modules of a model, found once, and what a call asks of each of them.

Some thousand modules are asked twice a call, for the most part by one pass of C: a loop of Python's over
them takes as long as twenty launches.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import chain, repeat
from operator import contains, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from tli_engine.integrations.held_code import is_known
from tli_engine.integrations.held_state import CONTAINERS, HeldState
from tli_engine.integrations.optimizer_steps import note_steps_on

# of a PEFT layer: which adapters are on; merging is a change of weights and is not undone
_ADAPTER_STATE = ("_disable_adapters", "_active_adapter")
_TRAINING = itemgetter("training")
_GLOBAL_HOOKS = tuple(
    f"_global_{name}"
    for name in ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# where accelerate notes its hook, which replaces the module's forward
_HOOK = "_hf_hook"


class Modules:
    """Modules of a model in the order of ``model.modules()``: all, or the first.

    What they hold is given module by module in that order: what fewer of them hold comes first in it.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = _not_scripted(modules)
        self._dicts = [m.__dict__ for m in modules]
        # what only holds others has no forward: neither its mode nor its hooks change anything
        self._called = [m.__dict__ for m in modules if type(m) not in CONTAINERS]
        # a module that torch.compile wraps has its mode itself
        self._in_mode = [d for d in self._called if "training" in d]
        self._adapted = [d for d in self._dicts if "_disable_adapters" in d]
        self._tensors = [d["_parameters"] for d in self._dicts if d["_parameters"]]
        self._children = [d["_modules"] for d in self._dicts if d["_modules"]]
        self._sizes, self._numbers = self._count()
        self._held = self._hold()

    def first(self, count: int) -> "Modules":
        """So many of them, as they were found."""
        some = Modules(())
        some._dicts = self._dicts[:count]
        held = {id(v) for d in some._dicts for v in (d, d["_parameters"], d["_modules"])}
        some._called = [d for d in self._called if id(d) in held]
        some._in_mode = [d for d in self._in_mode if id(d) in held]
        some._adapted = [d for d in self._adapted if id(d) in held]
        some._tensors = [d for d in self._tensors if id(d) in held]
        some._children = [d for d in self._children if id(d) in held]
        some._sizes = self._sizes[: len(some._tensors)]
        some._numbers = self._numbers[: len(some._children)]
        some._held = self._held[: sum(some._numbers)]
        return some

    def __len__(self) -> int:
        return len(self._dicts)

    def are_same(self) -> bool:
        """Whether they still consist of the same modules."""
        # lists compare by identity first: modules have no equality of their own
        return self._hold() == self._held and self._count() == (self._sizes, self._numbers)

    def _count(self) -> tuple[list[int], list[int]]:
        return [*map(len, self._tensors)], [*map(len, self._children)]

    def _hold(self) -> list[nn.Module | None]:
        return [*chain.from_iterable(map(dict.values, self._children))]

    def training(self) -> list[bool]:
        """Of each that is called, whether it is in training mode."""
        return [*map(_TRAINING, self._in_mode)]

    def set_training(self, flags: Sequence[bool]) -> None:
        """Put each in the mode that :meth:`training` gave."""
        for d, flag in zip(self._in_mode, flags, strict=False):
            d["training"] = flag

    def adapters(self) -> list[tuple[object, ...]]:
        """Which adapters are on, which are merged, and their scalings, layer by layer."""
        return [_adapter_state(layer) for layer in self._adapted]

    def set_adapters(self, state: Sequence[Any]) -> None:
        """Turn on the adapters that :meth:`adapters` gave; what is merged or scaled stays as it is."""
        for layer, (disabled, active, *_) in zip(self._adapted, state, strict=False):
            values = (disabled, list(active) if isinstance(active, tuple) else active)
            layer.update(zip(_ADAPTER_STATE, values, strict=True))

    def parameters(self) -> list[Tensor | None]:
        """Every parameter there is now; ``None`` where a module says that it has none."""
        return [*chain.from_iterable(map(dict.values, self._tensors))]


class ModelParts(Modules):
    """All modules of a model.

    Args:
        model: The model.
        decoder: That holds its ``layers`` and ``embed_tokens``.
    """

    def __init__(self, model: Any, decoder: Any) -> None:
        found = list(model.modules())
        modules = _not_scripted(found)
        super().__init__(modules)
        self._config, self._modules = model.config, modules
        self._state: HeldState | None = None
        # those that run at the call
        inside = {id(m) for block in decoder.layers for m in block.modules()}
        self._outside = [m for m in modules if id(m) not in inside]
        self._outer: HeldState | None = None
        self._is_scripted = len(modules) < len(found)
        self._holders = [d for d in self._dicts if d["_parameters"] or d["_buffers"]]
        numbers = {id(d): i for i, d in enumerate(self._dicts)}
        starts = [numbers.get(id(block.__dict__), 0) for block in decoder.layers]
        # a block ends where the next begins; not where a block comes twice, or they stand in another order
        self._ends = starts[1:] if sorted(set(starts)) == starts else []
        self._below: dict[int, Modules] = {}
        before, after = ("_forward_pre_hooks", "_backward_hooks"), "_forward_hooks"
        # hooks of itself and of the embedding run at the call anyway, if that runs
        embedding = [m.__dict__ for m in decoder.embed_tokens.modules()]
        self._at_embedding = [d[name] for d in embedding for name in _HOOKS]
        at_call = {id(d) for d in (model.__dict__, *embedding)}
        later = [d for d in self._called if id(d) not in at_call]
        self._hooks = [d[name] for d in later for name in before]
        self._after = [d[after] for d in later]
        self._hooked = [numbers[id(d)] for d in later]
        note_steps_on(self)

    @property
    def attention(self) -> str | None:
        """How the model attends: ``sdpa``, say; masks are made for it."""
        name: str | None = getattr(self._config, "_attn_implementation", None)
        return name

    def below(self, k: int) -> Modules:
        """Those that ``hidden_states[k]`` depends on, and maybe more; beyond the last block all."""
        if not 0 < k <= len(self._ends):
            return self
        if k not in self._below:
            self._below[k] = self.first(self._ends[k - 1])
        return self._below[k]

    def why_at_once(self) -> str | None:
        """Why a call cannot be put off, if something in the model is against it."""
        if self._is_scripted:
            return "it holds a module of torch.jit"
        if self._is_offloaded():
            return "it is offloaded by accelerate's hooks"
        if self.has_hooks():
            return "a module has hooks"
        if has_modes():
            return "a mode of torch watches what runs"
        foreign = self.held().foreign(self.attention)
        return f"code runs in it that no known library wrote: {foreign}" if foreign else None

    def why_not_remembered(self) -> str | None:
        """Why a call must run its embedding, if something in the model is against serving it."""
        hooks = (hook for some in filter(None, self._at_embedding) for hook in some.values())
        return None if all(map(_prepares, hooks)) else "its embeddings have hooks"

    def _is_offloaded(self) -> bool:
        """Whether weights come only while their module runs, and are others each time."""
        if not any(map(contains, self._holders, repeat(_HOOK))):
            return False
        return any(offloads(d.get(_HOOK)) for d in self._holders)

    def has_hooks(self, count: int | None = None) -> bool:
        """Whether a module has a hook that would run, or not run, at another time than it expects.

        Args:
            count: So many modules are looked at, the first; ``None``: all.
        """
        before, after = self._hooks, self._after
        if count is not None:
            some = bisect_left(self._hooked, count)
            before, after = before[: 2 * some], after[:some]
        if any(before):
            return True
        return any(not all(map(_captures, hooks.values())) for hooks in filter(None, after))

    def held(self) -> HeldState:
        """What the modules hold now beside weights and modes: the same object until it changes."""
        if self._state is None or not self._state.is_same():
            self._state, self._outer = HeldState(self._modules), None
        if self._outer is None:
            self._outer = HeldState(self._outside)
        return self._state

    def held_still(self) -> HeldState:
        """As :meth:`held`, if nothing ran since that was asked but what runs at a call before the blocks."""
        if self._state is None or self._outer is None or not self._outer.are_modules_same():
            self._outer = None
            return self.held()
        return self._state

    @property
    def last_held(self) -> HeldState:
        """What :meth:`held` found when it was asked last."""
        return self.held() if self._state is None else self._state


def has_global_hooks() -> bool:
    """Whether something looks at the calls of all modules."""
    return any(getattr(torch_module, name) for name in _GLOBAL_HOOKS)


def is_transformed() -> bool:
    """Whether it runs inside a transform of ``torch.func``, which goes through no op with gradients of its own."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def has_modes() -> bool:
    """Whether something sees, or changes, each operation of the calling thread."""
    if torch._C._len_torch_dispatch_stack() > 0:
        return True
    if torch._C._len_torch_function_stack() == 0:
        return False
    # torch's own default device is one
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())  # type: ignore[no-untyped-call]


def offloads(hook: Any) -> bool:
    """Whether a hook of accelerate's takes weights away after a call."""
    return any(getattr(h, "offload", False) for h in getattr(hook, "hooks", [hook]))


def _not_scripted(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those that hold what they hold where others do; modules of torch.jit do not."""
    return [m for m in modules if not isinstance(m, torch.jit.ScriptModule)]


def _adapter_state(layer: dict[str, Any]) -> tuple[object, ...]:
    active = layer["_active_adapter"]
    active = tuple(active) if isinstance(active, list) else active
    scaling = layer.get("scaling")
    scaling = tuple(scaling.items()) if isinstance(scaling, dict) else None
    # not all that adapts merges: what PEFT trains as a whole does not
    merged = tuple(layer.get("merged_adapters", ()))
    return layer["_disable_adapters"], active, merged, scaling


def _captures(hook: Any) -> bool:
    """Whether a hook is one of transformers' own, which do nothing unless they are asked."""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


def _prepares(hook: Any) -> bool:
    """Whether a hook of embeddings only asks for gradients, as transformers' and PEFT's does."""
    return is_known(hook) and getattr(hook, "__name__", "").startswith("make_inputs_require_grad")
