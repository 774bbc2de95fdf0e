"""What a block's modules hold, as far as a graph of the block depends on it."""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from tli_engine.integrations.held_code import Code, Configs
from tli_engine.integrations.same_objects import PLAIN, are_identical, places

# whose modules are known to launch the same kernels at every call; of PEFT the engine's own subclasses
_KNOWN = (
    "torch.nn.modules.",
    "transformers.activations",
    "transformers.models.",
    "tli_engine.integrations.",
)


class NotStaticError(Exception):
    """What a block does depends on more than tensors; the message says on what."""


class Weights:
    """Parameters and frozen weights of a block, where they lie now, and what else rules it.

    Attributes:
        trained: Parameters with a gradient, each once.
        code: What its modules run.
        configs: What they are configured by.
        key: Equal for calls that one graph serves.

    Raises:
        NotStaticError: The block cannot be recorded.
    """

    def __init__(self, modules: Sequence[Any], device: torch.device) -> None:
        """Look at ``modules``, all of the block's, which runs on ``device``."""
        self.trained: list[nn.Parameter] = []
        self._places: list[tuple[dict[str, Any], str, int]] = []
        numbers: dict[int, int] = {}
        found: list[Hashable] = []
        # bitsandbytes' parameters see every access to an attribute, 2 us each, unless told not to
        with torch._C.DisableTorchFunctionSubclass():
            for module in modules:
                _check(module)
                d = module.__dict__
                found += [v for v in d.values() if type(v) in PLAIN]
                for holder in (d["_parameters"], d["_buffers"]):
                    for name, tensor in holder.items():
                        if tensor is None:
                            continue
                        if tensor.device != device:
                            raise NotStaticError(f"{name} is on another device than hidden states")
                        found += (name, tensor.data_ptr(), tensor.dtype, tensor.requires_grad)
                        found += (tensor.shape, tensor.stride())
                        if tensor.requires_grad:
                            self._note(holder, name, tensor, numbers)
        found += [_of_peft(m.__dict__) for m in modules if "_disable_adapters" in m.__dict__]
        # laid out anew if written to: another object then, which the key keeps
        frozen = [m.frozen_weight() for m in modules if hasattr(type(m), "frozen_weight")]
        self.code, self.configs = Code(modules), Configs(modules)
        foreign = self.code.foreign()
        if foreign is not None:
            raise NotStaticError(f"another {foreign} than its own library's was put into a class")
        self.key = Key((*found, *frozen, *self.code.found, self.configs.frozen()))

    def _note(
        self, holder: dict[str, Any], name: str, tensor: Tensor, numbers: dict[int, int]
    ) -> None:
        if type(tensor) is not nn.Parameter:
            raise NotStaticError(f"{name} is trained and no plain parameter")
        if id(tensor) not in numbers:
            numbers[id(tensor)] = len(self.trained)
            self.trained.append(tensor)
        self._places.append((holder, name, numbers[id(tensor)]))

    @contextmanager
    def replaced(self, others: Sequence[Tensor]) -> Iterator[None]:
        """Let other tensors stand for those of :attr:`trained`."""
        theirs = [holder[name] for holder, name, _ in self._places]
        for holder, name, number in self._places:
            holder[name] = others[number]
        try:
            yield
        finally:
            for (holder, name, _), own in zip(self._places, theirs, strict=True):
                holder[name] = own


def _check(module: nn.Module) -> None:
    d, name = module.__dict__, type(module).__name__
    if not type(module).__module__.startswith(_KNOWN):
        raise NotStaticError(f"{name} is of a library that is not known to launch the same always")
    if (
        "forward" in d
        or d["_forward_pre_hooks"]
        or d["_backward_hooks"]
        or d["_backward_pre_hooks"]
    ):
        raise NotStaticError(f"{name} has a forward or hooks of its own")
    if d["training"]:
        drops = d.get("attention_dropout") or (isinstance(module, nn.Dropout) and module.p > 0)
        if drops:
            raise NotStaticError(f"{name} drops out")
        if d.get("gradient_checkpointing"):
            raise NotStaticError(f"{name} is run again in the backward pass")
    if "_disable_adapters" in d:
        from tli_engine.integrations.lora_layers import plain_update

        adapted: Any = module
        if plain_update(adapted) is None and not (adapted.disable_adapters and not adapted.merged):
            raise NotStaticError(
                f"{name} adds more than one adapter, one that drops out, or none plain"
            )


def _of_peft(d: dict[str, Any]) -> Hashable:
    active = d["_active_adapter"]
    return tuple(active) if isinstance(active, list) else active, tuple(d["scaling"].items())


class Key:
    """Something hashable, of which the hash is computed once; that of a block has some thousand parts."""

    __slots__ = ("_hash", "_value")

    def __init__(self, value: Hashable) -> None:
        self._value, self._hash = value, hash(value)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Key) and self._value == other._value)


class _Seen:
    """Everything that :class:`Weights` may look at, object by object.

    Attributes:
        weights: What was found in it.
    """

    def __init__(self, modules: Sequence[Any], device: torch.device) -> None:
        self._modules, self._device = modules, device
        self._types = [*map(type, modules)]
        self._values = self._look()
        held = [v for v in self._values if isinstance(v, (dict, list, set))]
        self._empty = [v for v in held if not v]
        self._filled = [v for v in held if v]
        self._sizes = [*map(len, self._filled)]
        self._contents = self._look_inside()
        holders = [d[name] for d in map(_DICT, modules) for name in ("_parameters", "_buffers")]
        self._tensors = [t for holder in holders for t in holder.values() if t is not None]
        self._laid_out = places(self._tensors)
        self._layers = [m for m in modules if hasattr(type(m), "frozen_weight")]
        self._frozen = [m.frozen_weight() for m in self._layers]
        self.weights = Weights(modules, device)

    def is_same(self, device: torch.device) -> bool:
        """Whether all is as it was; these objects are held, so that none takes another's place in memory."""
        return (
            device == self._device
            and are_identical([*map(type, self._modules)], self._types)
            and are_identical(self._look(), self._values)
            and not any(self._empty)
            and [*map(len, self._filled)] == self._sizes
            and are_identical(self._look_inside(), self._contents)
            and places(self._tensors) == self._laid_out
            and are_identical([m.frozen_weight() for m in self._layers], self._frozen)
            and self.weights.code.is_same()
            and self.weights.configs.is_same()
        )

    def _look(self) -> list[object]:
        return [*chain.from_iterable(map(dict.values, map(_DICT, self._modules)))]

    def _look_inside(self) -> list[object]:
        named = (v.values() for v in self._filled if isinstance(v, dict))
        return [*chain.from_iterable(self._filled), *chain.from_iterable(named)]


_DICT = attrgetter("__dict__")


class BlockWeights:
    """Weights of a block, found anew only when something that they depend on is another than before.

    That takes a sixth of finding them.

    Args:
        modules: All of the block's.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        self._seen: _Seen | None = None

    def on(self, device: torch.device) -> Weights:
        """Return them for a call on ``device``.

        Raises:
            NotStaticError: The block cannot be recorded.
        """
        if self._seen is None or not self._seen.is_same(device):
            self._seen = None
            self._seen = _Seen(self._modules, device)
        return self._seen.weights
