"""A block's call as a function of tensors, which does the same whenever it runs.

What a graph holds of it besides tensors is fixed when it is recorded: everything that could change it
later is looked at at each call, and is part of a key.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tli_engine.integrations.block_weights import BlockWeights, NotStaticError, Weights
from tli_engine.integrations.lazy_run import Step
from tli_engine.integrations.same_objects import PLAIN


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


def take_apart(step: Step, hidden: Tensor, held: BlockWeights) -> tuple[StaticBlock, list[Tensor]]:
    """Take apart a block's call on hidden states ``[B, T, D]``.

    Args:
        step: The call.
        hidden: What it runs on.
        held: By the block.

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
    weights = held.on(hidden.device)
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
    if value is None or type(value) in PLAIN:
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
