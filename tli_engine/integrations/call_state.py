"""What a model's result depends on beside its inputs, taken at the call, for work that is done later."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from tli_engine.errors import UserError

# of a PEFT layer: which adapters are on; merging is a change of weights and is not undone
_ADAPTER_STATE = ("_disable_adapters", "_active_adapter")


class ModelParts:
    """Modules of a model, found once; what a call asks of them takes some 50 us for a thousand.

    Attributes:
        adapted: What PEFT's layers among them hold, by name.
    """

    def __init__(self, model: Any, embedding: nn.Module) -> None:
        """Find the modules of ``model``; hooks of itself and of ``embedding`` run at the call anyway."""
        self._config = model.config
        self._dicts = [m.__dict__ for m in model.modules()]
        self.adapted = [d for d in self._dicts if "_disable_adapters" in d]
        self._tensors = [d["_parameters"] for d in self._dicts if d["_parameters"]]
        self._children = [d["_modules"] for d in self._dicts if d["_modules"]]
        self._held = self._hold()
        before, after = ("_forward_pre_hooks", "_backward_hooks"), "_forward_hooks"
        at_call = [model, *embedding.modules()]
        later = [d for d in self._dicts if all(d is not m.__dict__ for m in at_call)]
        self._hooks = [d[name] for d in later for name in before]
        self._after = [d[after] for d in later]

    @property
    def attention(self) -> str | None:
        """How the model attends: ``sdpa``, say; masks are made for it."""
        name: str | None = getattr(self._config, "_attn_implementation", None)
        return name

    def are_of(self) -> bool:
        """Whether the model still consists of these modules."""
        # tuples compare by identity first: modules have no equality of their own
        return self._hold() == self._held

    def _hold(self) -> list[tuple[object, ...]]:
        return [tuple(children.values()) for children in self._children]

    def training(self) -> list[bool]:
        """Of each module, whether it is in training mode."""
        return [d["training"] for d in self._dicts]

    def set_training(self, flags: Sequence[bool]) -> None:
        """Put each module in the mode that :meth:`training` gave."""
        for d, flag in zip(self._dicts, flags, strict=True):
            d["training"] = flag

    def adapters(self) -> list[tuple[object, ...]]:
        """Which adapters are on, which are merged, and their scalings, layer by layer."""
        return [_adapter_state(layer) for layer in self.adapted]

    def set_adapters(self, state: Sequence[Any]) -> None:
        """Turn on the adapters that :meth:`adapters` gave; what is merged or scaled stays as it is."""
        for layer, (disabled, active, *_) in zip(self.adapted, state, strict=True):
            values = (disabled, list(active) if isinstance(active, tuple) else active)
            layer.update(zip(_ADAPTER_STATE, values, strict=True))

    def has_hooks(self) -> bool:
        """Whether a module has a hook that would run, or not run, at another time than it expects."""
        if any(self._hooks):
            return True
        return any(not all(map(_captures, hooks.values())) for hooks in self._after if hooks)

    def parameters(self) -> list[Tensor]:
        """Every parameter there is now."""
        return [p for d in self._tensors for p in d.values() if p is not None]


def _adapter_state(layer: dict[str, Any]) -> tuple[object, ...]:
    active = layer["_active_adapter"]
    active = tuple(active) if isinstance(active, list) else active
    scaling = layer.get("scaling")
    scaling = tuple(scaling.items()) if isinstance(scaling, dict) else None
    return layer["_disable_adapters"], active, tuple(layer["merged_adapters"]), scaling


def _captures(hook: Any) -> bool:
    """Whether a hook is one of transformers' own, which do nothing unless they are asked."""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


class CallState:
    """Grad mode, autocast, modes, adapters and versions of the weights at a call.

    Attributes:
        grad: Whether gradients are wanted.
        parts: The model's modules.
        training: Of each module, whether it is in training mode.
        adapters: Which are on, and which are merged, layer by layer.
    """

    def __init__(self, parts: ModelParts, inputs: Sequence[Tensor], device: torch.device) -> None:
        self.parts, self._device = parts, device.type
        self.grad = torch.is_grad_enabled()
        self._inference = torch.is_inference_mode_enabled()
        self._autocast = torch.is_autocast_enabled(self._device)
        self._autocast_dtype = torch.get_autocast_dtype(self._device)
        self._autocast_cache = torch.is_autocast_cache_enabled()
        self.training, self.adapters = parts.training(), parts.adapters()
        self._attention = parts.attention
        self._inputs = list(inputs)
        self._weights = parts.parameters()
        self._versions = versions(self._weights), versions(self._inputs)

    @property
    def key(self) -> tuple[object, ...]:
        """What two calls must share, beside tokens and weights, to have one result."""
        precision = (self._autocast, self._autocast_dtype)
        return (self.grad, self._inference, self._attention, *precision, *self.adapters)

    def of_inputs(self, inputs: Sequence[Tensor]) -> "CallState":
        """The state of the same call on copies of its inputs."""
        other = copy(self)
        other._inputs = list(inputs)
        other._versions = self._versions[0], versions(inputs)
        return other

    def same_weights(self, other: "CallState") -> bool:
        """Whether both calls saw the same parameters with the same values."""
        same = len(self._weights) == len(other._weights)
        same = same and all(map(is_, self._weights, other._weights))
        return same and self._versions[0] == other._versions[0]

    @contextmanager
    def again(self, what: str) -> Iterator[None]:
        """Run what was put off as it would have run at the call.

        Raises:
            UserError: The weights or the inputs have been written to meanwhile.
        """
        self._check(what)
        parts = self.parts
        training, adapters = parts.training(), parts.adapters()
        if training != self.training:
            parts.set_training(self.training)
        if adapters != self.adapters:
            parts.set_adapters(self.adapters)
        try:
            with ExitStack() as modes:
                if torch.is_inference_mode_enabled() != self._inference:
                    modes.enter_context(torch.inference_mode(self._inference))
                modes.enter_context(torch.set_grad_enabled(self.grad))
                modes.enter_context(
                    torch.autocast(
                        self._device,
                        dtype=self._autocast_dtype,
                        enabled=self._autocast,
                        cache_enabled=self._autocast_cache,
                    )
                )
                yield
        finally:
            if training != self.training:
                parts.set_training(training)
            if adapters != self.adapters:
                parts.set_adapters(adapters)

    def _check(self, what: str) -> None:
        parts, now = self.parts, self.parts.parameters()
        same = parts.are_of() and len(now) == len(self._weights)
        same = same and all(map(is_, now, self._weights))
        same = same and _fixed(parts.adapters()) == _fixed(self.adapters)
        if not (same and versions(now) == self._versions[0]):
            raise UserError(
                f"{what} was not read before the model's weights changed; hidden states are "
                f"computed as they are read: read it right after the call, or call the model again"
            )
        if parts.attention != self._attention:
            raise UserError(
                f"{what} was not read before the model's attention was changed from "
                f"{self._attention} to {parts.attention}; read it right after the call"
            )
        if versions(self._inputs) != self._versions[1]:
            raise UserError(
                f"{what} was not read before the call's inputs were written to; read it right "
                f"after the call, or write to a copy"
            )


def _fixed(adapters: Sequence[tuple[object, ...]]) -> list[object]:
    """What a reading does not change back: what is merged, and scalings."""
    return [state[2:] for state in adapters]


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each was written to; -1 for those of inference mode."""
    # bitsandbytes' parameters see every access to an attribute, 2 us each, unless told not to
    with torch._C.DisableTorchFunctionSubclass():
        try:
            return [tensor._version for tensor in tensors]
        except RuntimeError:
            # tensors of inference mode have none, and are not written to outside it
            return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]
