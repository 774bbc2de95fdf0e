"""A decoder's blocks, run one after another as far as somebody reads.

The model's own ``forward`` runs once at the call, with stand-ins for its blocks that note what each
is given: masks, positions, rotary embeddings. The blocks then run from those notes, each as the
model would have called it, and for logits and losses ``forward`` runs once more around what they
gave. Nothing of a family's code is repeated here.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from tli_engine.errors import UserError
from tli_engine.integrations.call_state import CallState


class _NormReachedError(Exception):
    """Ends the first run where the blocks have been passed."""


class _Noted:
    """Stands in for a block: notes how it is called."""

    def __init__(self, block: Any, calls: list[Any]) -> None:
        self._block, self._calls = block, calls

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._calls.append((self._block, hidden, args, kwargs))
        return hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)


def _stop(*args: Any, **kwargs: Any) -> None:
    raise _NormReachedError


@contextmanager
def _shadowed(module: nn.Module, **attributes: Any) -> Iterator[None]:
    """Let attributes stand before a module's own for a while."""
    module.__dict__.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del module.__dict__[name]


class LazyRun:
    """One call of a model, computed up to the last hidden state that was read.

    Args:
        forward: The model's own ``forward``, bound.
        decoder: The module that holds ``layers`` and ``norm``.
        owner: The model whose ``forward`` it is; the decoder itself, or a causal LM over it.
        arguments: Of the call, by name.
        state: Of the call.
        stop_at: The last hidden state that may be read; None: all.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        decoder: Any,
        owner: Any,
        arguments: Mapping[str, Any],
        state: CallState,
        stop_at: int | None,
    ) -> None:
        self._forward, self._decoder, self._owner = forward, decoder, owner
        self._arguments, self.state, self._stop_at = dict(arguments), state, stop_at
        self._calls: list[Any] = []
        layers = [_Noted(block, self._calls) for block in decoder.layers]
        with _shadowed(decoder, layers=layers, norm=_stop):
            try:
                self._call()
            except _NormReachedError:
                pass
            else:
                raise AssertionError("forward did not reach the norm")
        # states that are held, by number; the last computed is always among them
        self.states: dict[int, Tensor] = {0: self._calls[0][1]}
        self.reached = 0
        self._hidden: Tensor = self._calls[0][1]

    @property
    def depth(self) -> int:
        """Number of blocks; the last hidden state's number."""
        return len(self._calls)

    def hidden_state(self, k: int) -> Tensor:
        """Return ``hidden_states[k]``, ``[B, T, D]``, running the blocks that it takes."""
        if self._stop_at is not None and k > self._stop_at:
            raise UserError(
                f"hidden_states[{k}] lies above stop_at={self._stop_at}, which the model was "
                f"accelerated with"
            )
        if k > self.reached:
            with self.state.again(f"hidden_states[{k}]"):
                while self.reached < k:
                    self._advance()
        return self.states[k]

    def rewind(self) -> None:
        """Start from the embeddings again; for a state that is no longer held."""
        self.reached, self._hidden = 0, self._calls[0][1]
        self.states = {0: self._hidden}

    def finish(self) -> Any:
        """Return the model's output but for hidden states and cache: logits, the loss, the last state."""
        last = self.hidden_state(self.depth)
        if self._owner is self._decoder:
            return SimpleNamespace(last_hidden_state=last)
        ran = SimpleNamespace(
            last_hidden_state=last, past_key_values=None, hidden_states=None, attentions=None
        )
        with (
            self.state.again("logits"),
            _shadowed(self._owner, model=lambda *args, **kwargs: ran),
        ):
            return self._call()

    def run_eagerly(self, **changes: Any) -> Any:
        """Return the output of the model's own ``forward``, all of it, as at the call."""
        if self._stop_at is not None:
            raise UserError(
                f"this reads more than hidden_states[{self._stop_at}], at which the model was "
                f"told to stop (stop_at={self._stop_at})"
            )
        with self.state.again("the output"):
            return self._forward(**self._arguments | changes)

    def _call(self) -> Any:
        return self._forward(
            **self._arguments
            | {"output_hidden_states": False, "use_cache": False, "return_dict": True}
        )

    def _advance(self) -> None:
        block, _, args, kwargs = self._calls[self.reached]
        out = block(self._hidden, *args, **kwargs)
        self._hidden = out[0] if isinstance(out, tuple) else out
        self.reached += 1
        # transformers gives the last one after the norm
        last = self.reached == self.depth
        self.states[self.reached] = self._decoder.norm(self._hidden) if last else self._hidden
