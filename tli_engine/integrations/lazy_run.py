"""A decoder's blocks, run one after another as far as somebody reads.

The model's own ``forward`` runs once at the call, with stand-ins for its blocks that note what each
is given: masks, positions, rotary embeddings. The blocks then run from those notes, each as the
model would have called it, and for logits and losses ``forward`` runs once more around what they
gave. Nothing of a family's code is repeated here.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from tli_engine.errors import UserError
from tli_engine.integrations.call_state import CallState

_NO_MORE = {"output_hidden_states": False, "use_cache": False, "return_dict": True}


@dataclass(frozen=True)
class Call:
    """A call of a model.

    Attributes:
        forward: The model's own ``forward``, not bound.
        decoder: The module that holds ``layers`` and ``norm``.
        owner: The model whose ``forward`` it is; the decoder itself, or a causal LM over it.
        arguments: By name.
        state: When it was made.
        stop_at: The last hidden state that may be read; None: all.
        counts: Of blocks that ran, and the like.
        lock: Of the decoder: one thread at a time works for its calls.
    """

    forward: Callable[..., Any]
    decoder: Any
    owner: Any
    arguments: Mapping[str, Any]
    state: CallState
    stop_at: int | None
    counts: Counter[str]
    lock: AbstractContextManager[Any]

    def run(self, model: Any, **changes: Any) -> Any:
        """Return what ``forward`` does on a model with other values of some arguments."""
        return self.forward(model, **{**self.arguments, **changes})


@dataclass(frozen=True)
class Step:
    """How a model calls one of its blocks."""

    block: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Run the block on ``[B, T, D]``."""
        out = self.block(hidden, *self.args, **self.kwargs)
        # a tuple in older versions of transformers
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result


class _NormReachedError(Exception):
    """Ends the first run where the blocks have been passed."""


class _Passed:
    """What stands for a hidden state on its way past the blocks; older versions take its first item."""

    def __getitem__(self, index: int) -> "_Passed":
        return self


class _Noted:
    """Stands in for a block: notes how it is called."""

    def __init__(self, block: Any, steps: list[Step], embedded: list[Tensor]) -> None:
        self._block, self._steps, self._embedded = block, steps, embedded

    def __call__(self, hidden: Any, *args: Any, **kwargs: Any) -> _Passed:
        self._steps.append(Step(self._block, args, kwargs))
        if not self._embedded:
            self._embedded.append(hidden)
        return _Passed()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)


def _stop(*args: Any, **kwargs: Any) -> None:
    raise _NormReachedError


def _standing_in(module: nn.Module, **attributes: Any) -> Any:
    """A module that holds what another holds, but for some attributes.

    The other stays as it is: a second thread may be inside.
    """
    other: Any = object.__new__(type(module))
    other.__dict__.update(module.__dict__, **attributes)
    return other


def note_steps(call: Call) -> tuple[list[Step], Tensor]:
    """Find out how a model calls its blocks, and what it gives the first, ``[B, T, D]``."""
    steps: list[Step] = []
    embedded: list[Tensor] = []
    layers = [_Noted(block, steps, embedded) for block in call.decoder.layers]
    model = _standing_in(call.decoder, layers=layers, norm=_stop)
    if call.owner is not call.decoder:
        model = _standing_in(call.owner, model=model)
    try:
        call.run(model, **_NO_MORE)
    except _NormReachedError:
        pass
    else:
        raise AssertionError("forward did not reach the norm")
    # rotary embeddings of some kinds change with the length of a text
    call.state.look()
    return steps, embedded[0]


RunStep = Callable[[int, Step, Tensor], Tensor]


def run_step(number: int, step: Step, hidden: Tensor) -> Tensor:
    """Run a block as it is."""
    return step(hidden)


class LazyRun:
    """A call, computed up to the last hidden state that was read.

    A caller may write to what it reads. What goes on from there then reads a copy, and not the caller the copy:
    gradients of a loss above are asked for by the tensor that the caller has.

    Args:
        call: The call.
        steps: Its blocks.
        embedded: ``hidden_states[0]``, ``[B, T, D]``.
        run: Runs one block.

    Attributes:
        states: Hidden states that are held, by number; the last computed is always among them. Those that
            callers hold may have been written to since.
        reached: Its number.
    """

    def __init__(
        self, call: Call, steps: list[Step], embedded: Tensor, run: RunStep = run_step
    ) -> None:
        self._call, self._steps, self._embedded, self._run = call, steps, embedded, run
        self.rewind()

    def rewind(self) -> None:
        """Start from the embeddings, again if need be: for a state that is no longer held."""
        self.reached, self._hidden = 0, self._embedded
        self.states: dict[int, Tensor] = {0: self._embedded}

    @property
    def depth(self) -> int:
        """Number of blocks; the last hidden state's number."""
        return len(self._steps)

    def read(self, k: int) -> Tensor:
        """Return ``hidden_states[k]``, ``[B, T, D]``, for a caller who may write to it."""
        state = self.hidden_state(k)
        if state is self._hidden and self._goes_on_from(k):
            with self._call.state.gradients():
                self._hidden = state.clone()
        return state

    def _goes_on_from(self, k: int) -> bool:
        """Whether something is computed of ``hidden_states[k]`` that may still be asked for."""
        call = self._call
        return k != call.stop_at and (k < self.depth or call.owner is not call.decoder)

    def hidden_state(self, k: int) -> Tensor:
        """Return ``hidden_states[k]``, ``[B, T, D]``, running the blocks that it takes; not to be written to."""
        stop_at = self._call.stop_at
        if stop_at is not None and k > stop_at:
            raise UserError(
                f"hidden_states[{k}] lies above stop_at={stop_at}, which the model was "
                f"accelerated with"
            )
        if k > self.reached:
            start = time.perf_counter_ns()
            with self._call.state.again(f"hidden_states[{k}]", k):
                while self.reached < k:
                    self._advance()
            took = time.perf_counter_ns() - start
            self._call.counts["read_ns"] += took
            self._call.counts.setdefault("first_read_ns", took)
        return self.states[k]

    def finish(self) -> Any:
        """Return a causal LM's output but for hidden states and cache: logits and the loss."""
        call = self._call
        with call.lock:
            self.hidden_state(self.depth)
            ran = SimpleNamespace(
                last_hidden_state=self._hidden,
                past_key_values=None,
                hidden_states=None,
                attentions=None,
            )
            with call.state.again("logits"):
                model = _standing_in(call.owner, model=lambda *args, **kwargs: ran)
                return call.run(model, **_NO_MORE)

    def run_eagerly(self, **changes: Any) -> Any:
        """Return the output of the model's own ``forward``, all of it, as at the call."""
        stop_at = self._call.stop_at
        if stop_at is not None:
            raise UserError(
                f"this reads more than hidden_states[{stop_at}], at which the model was "
                f"told to stop (stop_at={stop_at})"
            )
        with self._call.lock, self._call.state.again("the output"):
            return self._call.run(self._call.owner, **changes)

    def _advance(self) -> None:
        self._call.counts["blocks"] += 1
        hidden = self._run(self.reached, self._steps[self.reached], self._hidden)
        self.reached += 1
        # transformers gives the last one after the norm
        self._hidden = self._call.decoder.norm(hidden) if self.reached == self.depth else hidden
        self.states[self.reached] = self._hidden
