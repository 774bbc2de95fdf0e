"""What a model's result depends on beside its inputs, taken at the call, for work that is done later."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy

import torch
from torch import Tensor

from tli_engine.errors import UserError
from tli_engine.integrations.model_parts import ModelParts, Modules, has_global_hooks
from tli_engine.integrations.same_objects import addresses, are_same_weights, versions
from tli_engine.integrations.weight_writes import certain_writes, is_watched, writes_to


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
        self._since, self._own_writes = certain_writes(), dict[int, int]()
        # where all that moves a weight is watched its place need not be looked at
        self._addresses = None if is_watched() else addresses(self._weights)
        self._held = parts.last_held

    def look(self) -> None:
        """Note what modules hold beside weights: what they changed themselves until now is no change."""
        self._held = self.parts.held_still()

    @property
    def is_counted(self) -> bool:
        """Whether all writes to weights and buffers are counted; those of inference mode do not count."""
        return -1 not in self._versions[0] and self._held.is_counted

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

    def copy_of(self, hidden: Tensor) -> Tensor:
        """A copy as the call would give it, which in inference mode is a tensor of that."""
        if torch.is_inference_mode_enabled() == self._inference:
            return hidden.clone()
        with self.gradients():
            return hidden.clone()

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
            before = certain_writes()
            with self.gradients(), autocast:
                yield
            self._note_own_changes(parts, before)
        finally:
            if changes_mode:
                parts.set_training(training)
            if changes_adapters:
                parts.set_adapters(adapters)

    def _check(self, what: str, parts: Modules, adapters: Sequence[tuple[object, ...]]) -> None:
        now = parts.parameters()
        same = parts.are_same() and are_same_weights(now, self._weights[: len(now)])
        same = same and _fixed(adapters) == _fixed(self.adapters[: len(adapters)])
        same = same and versions(now) == self._versions[0][: len(now)]
        if self._addresses is not None:
            same = same and addresses(now) == self._addresses[: len(now)]
        looked_at = [*now, *self._held.tensors(len(parts))]
        if not same or writes_to(looked_at, self._since).items() - self._own_writes.items():
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

    def _note_own_changes(self, parts: Modules, before: int) -> None:
        """Note what the run itself has moved, as layers of bitsandbytes convert their biases."""
        now = parts.parameters()
        self._own_writes |= writes_to(now, before)
        if self._addresses is not None:
            self._addresses[: len(now)] = addresses(now)


def _fixed(adapters: Sequence[tuple[object, ...]]) -> list[object]:
    """What a reading does not change back: what is merged, and scalings."""
    return [state[2:] for state in adapters]
