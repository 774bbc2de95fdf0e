"""A block recorded forward and backward, and the node of autograd that replays it."""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd import Variable

from tli_engine.integrations.call_state import CallState
from tli_engine.integrations.same_objects import versions
from tli_engine.integrations.static_block import StaticBlock

T = TypeVar("T")


class Graph(Protocol):
    """What was recorded."""

    def replay(self) -> None:
        """Do it again."""


class Recorder(Protocol):
    """Records what functions launch; see :class:`tli_engine.models.graph_recorder.GraphRecorder`."""

    def launch(self, run: Callable[[], T]) -> T:
        """Run it."""

    def new_pool(self) -> Any:
        """Memory for graphs of which another's replay must not overwrite anything."""

    def record(self, run: Callable[[], T], pool: Any) -> tuple[Graph, T]:
        """The graph, and what ``run`` returned, which each replay writes."""

    def memory(self, pool: Any) -> int:
        """Bytes that graphs of a pool hold."""

    def give_back(self) -> None:
        """Let others have the memory of graphs that are no more."""


class Recording:
    """A block and its gradients as two graphs; it serves one call at a time.

    Both lie in memory of their own: calls of one shape and of another come in any order, and others run
    between a call's way there and its way back, which needs what was left there.

    Args:
        block: As it is called.
        tensors: What it is given; copied.
        trained: Leaves on the same memory as its trained parameters.
        recorder: Makes the graphs.
        is_warm: Another recording of such calls was made before.

    Attributes:
        used: Number of the call that used it last.
        nbytes: Memory that it holds.
        lease: Of that call.
    """

    used = 0
    lease: "weakref.ref[Lease] | None" = None

    def __init__(
        self,
        block: StaticBlock,
        tensors: Sequence[Tensor],
        trained: Sequence[Tensor],
        recorder: Recorder,
        is_warm: bool = False,
    ) -> None:
        own = [t.detach().resolve_neg().clone() for t in tensors]
        self._inputs = [
            o.requires_grad_(t.requires_grad) for o, t in zip(own, tensors, strict=True)
        ]
        self._are_bytes = [_copies_as_bytes(t) for t in tensors]
        self._owns = _by_dtype(self._inputs, self._are_bytes)
        self._block, self._trained = block, list(trained)
        self._dy = torch.empty(0)
        if not is_warm:
            # kernels are compiled and libraries set themselves up outside the graphs
            recorder.launch(self._warm_up)
        pool = recorder.new_pool()
        self._forward, y = recorder.record(self._go, pool)
        self._y = y.detach()
        self._dy = torch.zeros_like(self._y)
        self._backward, (self._dx, self._gradients) = recorder.record(self._return, pool)
        self.nbytes = recorder.memory(pool) + sum(t.nbytes for t in (*self._inputs, self._dy))

    def _warm_up(self) -> None:
        self._dy = torch.zeros_like(self._go())
        self._return()

    def _go(self) -> Tensor:
        # held for ever, and with it what the way back reads
        self._live = self._block.run(self._inputs, self._trained)
        return self._live

    def _return(self) -> tuple[Tensor | None, list[Tensor | None]]:
        first = [t for t in self._inputs[:1] if t.requires_grad]
        wanted = [*first, *self._trained]
        found = torch.autograd.grad(
            self._live, wanted, self._dy, retain_graph=True, allow_unused=True
        )
        gradients = found[len(first) :]
        joined: dict[torch.dtype, list[Tensor]] = {}
        for gradient in gradients:
            if gradient is not None:
                joined.setdefault(gradient.dtype, []).append(gradient)
        self._sizes = [(g.dtype, g.shape) if g is not None else None for g in gradients]
        # side by side: one copy gives a call all of them
        flat = [torch.cat([g.reshape(-1) for g in some]) for some in joined.values()]
        return (found[0] if first else None), [*flat]

    @property
    def is_free(self) -> bool:
        """Whether no call will read it any more."""
        lease = None if self.lease is None else self.lease()
        return lease is None or lease.is_over

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return a copy of what the block makes of ``inputs``."""
        others = _by_dtype(inputs, self._are_bytes)
        for dtype, owns in self._owns.items():
            torch._foreach_copy_(owns, others[dtype])
        self._forward.replay()
        return self._y.clone()

    def backward(self, dy: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
        """Return copies of the gradients of the first input, and of what is trained."""
        self._dy.copy_(dy)
        self._backward.replay()
        flat = {g.dtype: g.clone() for g in self._gradients if g is not None}
        used = dict.fromkeys(flat, 0)
        gradients: list[Tensor | None] = []
        for size in self._sizes:
            if size is None:
                gradients.append(None)
                continue
            dtype, shape = size
            first = used[dtype]
            used[dtype] = first + shape.numel()
            gradients.append(flat[dtype][first : used[dtype]].view(shape))
        return (None if self._dx is None else self._dx.clone()), gradients


def _copies_as_bytes(tensor: Tensor) -> bool:
    """Whether a tensor's bytes are a tensor too."""
    return tensor.ndim > 0 and tensor.stride(-1) == 1 and not tensor.is_complex()


def _by_dtype(tensors: Sequence[Tensor], are_bytes: Sequence[bool]) -> dict[Any, list[Tensor]]:
    """Group what one launch can copy; as bytes everything can be."""
    groups: dict[Any, list[Tensor]] = {}
    for tensor, is_bytes in zip(tensors, are_bytes, strict=True):
        some = tensor.detach()
        if is_bytes:
            # what is only marked as negated has other bytes
            some = some.resolve_neg().view(torch.uint8)
        groups.setdefault(some.dtype, []).append(some)
    return groups


class Lease:
    """A call's claim on a recording: until its gradients cannot be asked for any more."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.node: weakref.ref[Any] | None = None
        recording.lease = weakref.ref(self)

    @property
    def is_over(self) -> bool:
        """Whether the call's backward pass is done, or would be an error."""
        node = None if self.node is None else self.node()
        if node is None:
            return True
        try:
            # autograd refuses what was given up after a backward pass, and what was written to
            node.saved_tensors  # noqa: B018
        except RuntimeError:
            return True
        return False


class Replayed(torch.autograd.Function):
    """A call of a recording: what the block is given, then its trained parameters."""

    @staticmethod
    def forward(
        ctx: Any, lease: Lease, block: StaticBlock, state: CallState, *tensors: Tensor
    ) -> Tensor:
        """Return what the block makes of its inputs; ``state`` is that of the model's call."""
        ctx.lease, ctx.block, ctx.state = lease, block, state
        lease.node = weakref.ref(ctx)
        first = len(tensors) - len(block.weights.trained)
        ctx.inputs, ctx.versions = tensors[:first], versions(tensors[:first])
        # something always: what was given up is told by it
        ctx.save_for_backward(*(tensors[first:] or (tensors[0].new_empty(0),)))
        return lease.recording.forward(ctx.inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        """Return the gradients.

        Raises:
            RuntimeError: A parameter was written to since, or the graph was given up.
        """
        # an error if the recording may be another call's by now
        trained, block = ctx.saved_tensors, ctx.block
        if torch.is_grad_enabled():
            if versions(ctx.inputs) != ctx.versions:
                raise RuntimeError("a hidden state has been modified by an inplace operation")
            with ctx.state.again("the gradient of a hidden state"):
                trained = trained[: len(block.weights.trained)]
                dx, gradients = _launched(block, ctx.inputs, trained, dy)
        else:
            dx, gradients = ctx.lease.recording.backward(dy)
        others = len(ctx.inputs) - 1
        # autograd gives up what was saved, unless it is to be retained, when this has returned
        Variable._execution_engine.queue_callback(partial(_give_up, ctx))
        return (None, None, None, dx, *[None] * others, *gradients)


def _give_up(ctx: Any) -> None:
    """Let go of a call's inputs if no gradients can be asked for any more; its loss may be held for long."""
    if ctx.lease.is_over:
        ctx.inputs = ()


def _launched(
    block: StaticBlock, inputs: Sequence[Tensor], trained: Sequence[Tensor], dy: Tensor
) -> tuple[Tensor | None, Sequence[Tensor | None]]:
    """Gradients that have gradients, for ``create_graph=True``: the block runs once more."""
    wanted = [*(t for t in inputs[:1] if t.requires_grad), *trained]
    y = block.run(inputs, trained)
    found = torch.autograd.grad(y, wanted, dy, create_graph=True, allow_unused=True)
    return (found[0], found[1:]) if inputs[0].requires_grad else (None, found)
