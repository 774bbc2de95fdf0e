"""What a model's result depends on beside its inputs, taken at the call, for work that is done later."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tli_engine.errors import UserError

# of a PEFT layer: which adapters are on; merging is a change of weights and is not undone
_ADAPTER_STATE = ("_disable_adapters", "_active_adapter")


class ModelParts:
    """Modules of a model in the order of the model, found once; see :meth:`are_of`.

    Attributes:
        modules: All of them.
        adapted: PEFT's layers among them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.modules())
        self.adapted = [m.__dict__ for m in self.modules if "_disable_adapters" in m.__dict__]
        self._dicts = [m.__dict__ for m in self.modules]
        self._tensors = [d["_parameters"] for d in self._dicts if d["_parameters"]]
        self._children = [d["_modules"] for d in self._dicts]
        self._held = [tuple(children.values()) for children in self._children]

    def are_of(self) -> bool:
        """Whether the model still consists of these modules."""
        return all(
            len(children) == len(held) and all(map(_is, children.values(), held))
            for children, held in zip(self._children, self._held, strict=True)
        )

    def training(self) -> list[bool]:
        """Of each module, whether it is in training mode."""
        return [d["training"] for d in self._dicts]

    def set_training(self, flags: Sequence[bool]) -> None:
        """Put each module in the mode that :meth:`training` gave."""
        for d, flag in zip(self._dicts, flags, strict=True):
            d["training"] = flag

    def adapters(self) -> tuple[object, ...]:
        """Which adapters are on, and which are merged, layer by layer."""
        return tuple(_adapter_state(layer) for layer in self.adapted)

    def set_adapters(self, state: Sequence[Any]) -> None:
        """Turn on the adapters that :meth:`adapters` gave; merged ones stay as they are."""
        for layer, (disabled, active, _) in zip(self.adapted, state, strict=True):
            values = (disabled, list(active) if isinstance(active, tuple) else active)
            layer.update(zip(_ADAPTER_STATE, values, strict=True))

    def has_hooks(self) -> bool:
        """Whether a module has a hook that would run, or not run, at another time than it expects."""
        return any(
            d["_forward_pre_hooks"]
            or d["_backward_hooks"]
            or (d["_forward_hooks"] and not all(map(_captures, d["_forward_hooks"].values())))
            for d in self._dicts
        )

    def parameters(self) -> list[Tensor]:
        """Every parameter there is now."""
        return [p for d in self._tensors for p in d.values() if p is not None]


def _is(a: object, b: object) -> bool:
    return a is b


def _adapter_state(layer: dict[str, Any]) -> tuple[object, object, object]:
    active = layer["_active_adapter"]
    active = tuple(active) if isinstance(active, list) else active
    return layer["_disable_adapters"], active, tuple(layer["merged_adapters"])


def _captures(hook: Any) -> bool:
    """Whether a hook is one of transformers' own, which do nothing unless they are asked."""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


class CallState:
    """Grad mode, autocast, modes, adapters and versions of the weights at a call."""

    def __init__(self, parts: ModelParts, inputs: Sequence[Tensor], device: torch.device) -> None:
        self._parts, self._device = parts, device.type
        self.grad = torch.is_grad_enabled()
        self._inference = torch.is_inference_mode_enabled()
        self._autocast = torch.is_autocast_enabled(self._device)
        self._autocast_dtype = torch.get_autocast_dtype(self._device)
        self._autocast_cache = torch.is_autocast_cache_enabled()
        self.training, self.adapters = parts.training(), parts.adapters()
        self._inputs = [(t, _version(t)) for t in inputs]
        self._weights = [(p, _version(p)) for p in parts.parameters()]

    @property
    def key(self) -> tuple[object, ...]:
        """What two calls must share, beside tokens and weights, to have one result."""
        precision = (self._autocast, self._autocast_dtype)
        return (self.grad, self._inference, *precision, self.adapters)

    def same_weights(self, other: "CallState") -> bool:
        """Whether both calls saw the same parameters with the same values."""
        return len(self._weights) == len(other._weights) and all(
            p is q and v == w
            for (p, v), (q, w) in zip(self._weights, other._weights, strict=True)
        )

    @contextmanager
    def again(self, what: str) -> Iterator[None]:
        """Run what was put off as it would have run at the call.

        Raises:
            UserError: The weights or the inputs have been written to meanwhile.
        """
        self._check(what)
        parts = self._parts
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
        merged = [state[2] for state in self._parts.adapters()]  # type: ignore[index]
        changed = merged != [state[2] for state in self.adapters]  # type: ignore[index]
        now = self._parts.parameters()
        changed = changed or len(now) != len(self._weights) or not self._parts.are_of()
        changed = changed or any(
            p is not q or _version(q) != v for (p, v), q in zip(self._weights, now, strict=True)
        )
        if changed:
            raise UserError(
                f"{what} was not read before the model's weights changed; hidden states are "
                f"computed as they are read: read it right after the call, or call the model again"
            )
        if any(_version(tensor) != version for tensor, version in self._inputs):
            raise UserError(
                f"{what} was not read before the call's inputs were written to; read it right "
                f"after the call, or write to a copy"
            )


def _version(tensor: Tensor) -> int:
    # tensors of inference mode have none, and are not changed outside it
    return -1 if tensor.is_inference() else tensor._version
