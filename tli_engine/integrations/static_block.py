"""A block's call as a function of tensors, which does the same whenever it runs.

What a graph holds of it besides tensors is fixed when it is recorded: everything that could change it
later is looked at at each call, and is part of a key.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tli_engine.integrations.lazy_run import Step

# whose modules are known to launch the same kernels at every call; of PEFT the engine's own subclasses
_KNOWN = (
    "torch.nn.modules.",
    "transformers.activations",
    "transformers.models.",
    "tli_engine.integrations.",
)
_PLAIN = frozenset((bool, int, float, str))


class NotStaticError(Exception):
    """What a block does depends on more than tensors; the message says on what."""


class Weights:
    """Parameters and frozen weights of a block, where they lie now, and what else rules it.

    Attributes:
        trained: Parameters with a gradient, each once.
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
                found += [v for v in d.values() if type(v) in _PLAIN]
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
        self.key = (*found, *frozen)

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


@dataclass(frozen=True)
class StaticBlock:
    """A block as it is called, but for the tensors that it is given.

    Attributes:
        block: Of the decoder.
        args: What it is given, in the form of :func:`_take_apart`.
        kwargs: By name, likewise.
        weights: What it holds.
        key: Equal for calls that one graph serves.
    """

    block: nn.Module
    args: Any
    kwargs: Any
    weights: Weights
    key: Hashable

    def run(self, tensors: Sequence[Tensor], trained: Sequence[Tensor]) -> Tensor:
        """Run the block on tensors, hidden states ``[B, T, D]`` first, with others for those trained."""
        args, kwargs = _build(self.args, tensors), _build(self.kwargs, tensors)
        with self.weights.replaced(trained):
            return Step(self.block, args, kwargs)(tensors[0])


def take_apart(
    step: Step, hidden: Tensor, modules: Sequence[nn.Module]
) -> tuple[StaticBlock, list[Tensor]]:
    """Take apart a block's call on hidden states ``[B, T, D]``.

    Args:
        step: The call.
        hidden: What it runs on.
        modules: All of the block's.

    Returns:
        The call but for its tensors, and these, ``hidden`` first; each once.

    Raises:
        NotStaticError: The block is given, or holds, what may do something else the next time.
    """
    tensors, numbers = [hidden], {id(hidden): 0}
    args = _take_apart(step.args, tensors, numbers)
    kwargs = _take_apart(step.kwargs, tensors, numbers)
    if any(t.requires_grad for t in tensors[1:]):
        raise NotStaticError("a block is given more than one tensor with a gradient")
    # a graph would hold the numbers that the host read of it
    if any(t.device != hidden.device for t in tensors):
        raise NotStaticError("a block is given a tensor on another device than hidden states")
    weights = Weights(modules, hidden.device)
    if not (weights.trained or hidden.requires_grad):
        raise NotStaticError("nothing up to there is trained")
    shapes = ((t.shape, t.stride(), t.dtype, t.requires_grad) for t in tensors)
    key = (*shapes, args, kwargs, weights.key)
    return StaticBlock(step.block, args, kwargs, weights, key), tensors


def _take_apart(value: Any, tensors: list[Tensor], numbers: dict[int, int]) -> Any:
    """A hashable form of a value, in which tensors are numbers; they are added to ``tensors``."""
    if isinstance(value, Tensor):
        if id(value) not in numbers:
            numbers[id(value)] = len(tensors)
            tensors.append(value)
        return Tensor, numbers[id(value)]
    if isinstance(value, Mapping):
        return dict, tuple((k, _take_apart(v, tensors, numbers)) for k, v in value.items())
    if type(value) in (tuple, list):
        return type(value), tuple(_take_apart(v, tensors, numbers) for v in value)
    if value is None or type(value) in _PLAIN:
        return type(value), value
    raise NotStaticError(f"a block is given a {type(value).__name__}")


def _build(form: Any, tensors: Sequence[Tensor]) -> Any:
    """Undo :func:`_take_apart` on other tensors."""
    kind, held = form
    if kind is Tensor:
        return tensors[held]
    if kind is dict:
        return {name: _build(value, tensors) for name, value in held}
    if kind in (tuple, list):
        return kind(_build(value, tensors) for value in held)
    return held
