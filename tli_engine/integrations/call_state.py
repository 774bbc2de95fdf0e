"""What a model's result depends on beside its inputs, taken at the call, for work that is done later."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy

import torch
from torch import Tensor

from tli_engine.errors import UserError
from tli_engine.integrations.held_state import HeldState
from tli_engine.integrations.model_parts import ModelParts, Modules, has_global_hooks
from tli_engine.integrations.same_objects import are_same_weights, versions


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
        self._held: HeldState | None = None

    def look(self) -> None:
        """Note what modules hold beside weights: what they changed themselves until now is no change."""
        self._held = self.parts.held()

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
        """Whether both calls saw the same parameters with the same values, in the same modules."""
        same = self._held is other._held and are_same_weights(self._weights, other._weights)
        return same and self._versions[0] == other._versions[0]

    @contextmanager
    def gradients(self) -> Iterator[None]:
        """Compute with or without gradients, as the call did."""
        with ExitStack() as modes:
            if torch.is_inference_mode_enabled() != self._inference:
                modes.enter_context(torch.inference_mode(self._inference))
            modes.enter_context(torch.set_grad_enabled(self.grad))
            yield

    @contextmanager
    def again(self, what: str, k: int | None = None) -> Iterator[None]:
        """Run what was put off as it would have run at the call.

        Args:
            what: For an error.
            k: A hidden state: what it does not depend on is not looked at. ``None``: all is.

        Raises:
            UserError: The weights or the inputs have been written to meanwhile.
        """
        parts = self.parts if k is None else self.parts.below(k)
        training, adapters = parts.training(), parts.adapters()
        self._check(what, parts, adapters)
        # where the call's are those of more modules, these are the first
        changes_mode = training != self.training[: len(training)]
        changes_adapters = adapters != self.adapters[: len(adapters)]
        if changes_mode:
            parts.set_training(self.training)
        if changes_adapters:
            parts.set_adapters(self.adapters)
        try:
            autocast = torch.autocast(
                self._device,
                dtype=self._autocast_dtype,
                enabled=self._autocast,
                cache_enabled=self._autocast_cache,
            )
            with self.gradients(), autocast:
                yield
        finally:
            if changes_mode:
                parts.set_training(training)
            if changes_adapters:
                parts.set_adapters(adapters)

    def _check(self, what: str, parts: Modules, adapters: Sequence[tuple[object, ...]]) -> None:
        now = parts.parameters()
        same = parts.are_same() and are_same_weights(now, self._weights[: len(now)])
        same = same and _fixed(adapters) == _fixed(self.adapters[: len(adapters)])
        if not (same and versions(now) == self._versions[0][: len(now)]):
            raise UserError(
                f"{what} was not read before the model's weights changed; hidden states are "
                f"computed as they are read: read it right after the call, or call the model again"
            )
        attention = self.parts.attention
        if attention != self._attention:
            raise UserError(
                f"{what} was not read before the model's attention was changed from "
                f"{self._attention} to {attention}; read it right after the call"
            )
        assert self._held is not None
        change = self._held.change(len(parts))
        if change is not None or self.parts.has_hooks(len(parts)) or has_global_hooks():
            raise UserError(
                f"{what} was not read before {change or 'a hook'} was changed; hidden states are "
                f"computed as they are read: read it right after the call, or call the model again"
            )
        if versions(self._inputs) != self._versions[1]:
            raise UserError(
                f"{what} was not read before the call's inputs were written to; read it right "
                f"after the call, or write to a copy"
            )


def _fixed(adapters: Sequence[tuple[object, ...]]) -> list[object]:
    """What a reading does not change back: what is merged, and scalings."""
    return [state[2:] for state in adapters]
