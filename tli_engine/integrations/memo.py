"""Calls of one word that were made before: their hidden states are held, and computed on from there.

A scan that calls the model on one word anew for every layer then runs each block once a word. What
is handed out are copies, bit for bit what the call would compute: the same blocks on the same tensors.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tli_engine.integrations.call_state import CallState
from tli_engine.integrations.lazy_run import Call, LazyRun, Step, note_steps
from tli_engine.integrations.replay import Replays
from tli_engine.integrations.weight_writes import writes

# a word and its presentation; a longer text is hardly called twice
_LONGEST = 64
# hidden states held for all words of a model
_BYTES = 1 << 30
# arguments of a call that is served, of others nothing is known; what tokenizers give, and what it is
# for a word that is neither padded nor the second of two
_TOKENS = {"attention_mask": 1, "token_type_ids": 0}
_KNOWN = {"input_ids", *_TOKENS, "output_hidden_states", "return_dict", "use_cache"}

# before a reason among a model's counts, which count the calls on words that it kept from being remembered
NOT_REMEMBERED = "not remembered: "

Key = tuple[object, ...]


class _Word(NamedTuple):
    """Token ids of a call on one short text, where it runs, and what else the tokenizer gave."""

    device: torch.device
    ids: tuple[int, ...]
    others: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]

    @property
    def kind(self) -> Key:
        """What the calls of its blocks depend on, if it :attr:`is_plain`."""
        names = tuple((name, dtype) for name, dtype, _ in self.others)
        return (self.device, len(self.ids), names)

    @property
    def is_plain(self) -> bool:
        """Whether every token counts, and all alike."""
        return all(set(values) == {_TOKENS[name]} for name, _, values in self.others)


class Memo:
    """Runs by their tokens, for one state of the weights.

    Args:
        limit: Bytes of hidden states that are held. Beyond it all but a run's last go, then the
            runs that were used longest ago.
    """

    def __init__(self, limit: int = _BYTES) -> None:
        self._limit = limit
        self._runs: OrderedDict[Key, LazyRun] = OrderedDict()
        self._sizes: dict[Key, int] = {}
        # how blocks are called, which for a whole word depends on its length alone
        self._steps: dict[Key, list[Step] | None] = {}
        # a graph replayed for tensors of another device would give what it gave last
        self._replays: dict[torch.device, Replays] = {}
        self._seen: tuple[CallState, int] | None = None

    def __len__(self) -> int:
        return len(self._runs)

    def find(self, call: Call) -> tuple[LazyRun, Callable[[int], Tensor]] | None:
        """The run of a call, an earlier one if there was, and what reads its hidden states.

        ``None`` for a call that is not of one word, is trained through, or drops out, and for one that cannot be
        remembered: why is counted with its model, as :data:`NOT_REMEMBERED` and a reason.
        """
        state = call.state
        word = None if state.grad or any(state.training) else _word(call.arguments)
        if word is None:
            return None
        reason = state.parts.why_not_remembered()
        self._forget_if_changed(state)
        key = (*word, *state.key)
        run = self._runs.get(key)
        if run is None and not state.is_counted:
            reason = "it has weights or buffers of inference mode"
        if reason is not None:
            call.counts[f"{NOT_REMEMBERED}{reason}"] += 1
            return None
        if run is None:
            run = self._runs[key] = self._run(call, word)
        else:
            call.counts["words"] += 1
        self._runs.move_to_end(key)
        read: dict[int, Tensor] = {}

        def hidden_state(k: int) -> Tensor:
            if k not in read:
                # the caller may write to what it gets
                read[k] = state.copy_of(self._read(key, run, k))
            return read[k]

        return run, hidden_state

    def _forget_if_changed(self, state: CallState) -> None:
        seen = self._seen
        if seen is None or seen[1] != writes() or not state.same_weights(seen[0]):
            self._runs.clear()
            self._sizes.clear()
            self._steps.clear()
            for replays in self._replays.values():
                replays.clear()
        self._seen = state, writes()

    def _run(self, call: Call, word: _Word) -> LazyRun:
        # a run outlives its call, whose tensors the caller may write to
        arguments = {
            n: v.clone() if isinstance(v, Tensor) else v for n, v in call.arguments.items()
        }
        state = call.state.of_inputs([v for v in arguments.values() if isinstance(v, Tensor)])
        call = replace(call, arguments=arguments, state=state)
        if not word.is_plain:
            return LazyRun(call, *note_steps(call))
        key = (*word.kind, *call.state.key)
        embed = call.decoder.embed_tokens
        if self._steps.get(key) is None:
            steps, embedded = note_steps(call)
            # in some families more is done to the embeddings than their module does
            plain = key not in self._steps and torch.equal(
                embedded, embed(call.arguments["input_ids"])
            )
            self._steps[key] = steps if plain else None
            return LazyRun(call, steps, embedded)
        if word.device not in self._replays:
            self._replays[word.device] = Replays.on(word.device)
        replays = self._replays[word.device]

        def run_step(number: int, step: Step, hidden: Tensor) -> Tensor:
            return replays((*key, number), step, hidden)

        found = self._steps[key]
        assert found is not None
        return LazyRun(call, found, embed(call.arguments["input_ids"]), run_step)

    def _read(self, key: Key, run: LazyRun, k: int) -> Tensor:
        if k <= run.reached and k not in run.states:
            run.rewind()
        hidden = run.hidden_state(k)
        if self._runs.get(key) is run:
            self._sizes[key] = sum(state.nbytes for state in run.states.values())
            self._make_room()
        return hidden

    def _make_room(self) -> None:
        held = sum(self._sizes.values())
        for key in list(self._sizes) if held > self._limit else ():
            run = self._runs[key]
            held -= self._sizes[key]
            run.states = {run.reached: run.states[run.reached]}
            self._sizes[key] = run.states[run.reached].nbytes
            held += self._sizes[key]
        while held > self._limit and len(self._runs) > 1:
            key, _ = self._runs.popitem(last=False)
            held -= self._sizes.pop(key, 0)


def _word(arguments: Mapping[str, Any]) -> _Word | None:
    """The word that a call is of; ``None`` for any other call."""
    given = {name: value for name, value in arguments.items() if value is not None}
    ids = given.get("input_ids")
    if given.keys() - _KNOWN or not isinstance(ids, Tensor) or ids.ndim != 2 or len(ids) != 1:
        return None
    if not 1 <= ids.shape[1] <= _LONGEST:
        return None
    others = {name: given[name] for name in _TOKENS if name in given}
    for other in others.values():
        if not isinstance(other, Tensor) or other.shape != ids.shape or other.device != ids.device:
            return None
        if other.is_floating_point():
            return None
    # one wait for the device, not one for each
    first, *rest = torch.stack([t[0].long() for t in (ids, *others.values())]).tolist()
    known = (
        (name, other.dtype, tuple(values))
        for (name, other), values in zip(others.items(), rest, strict=True)
    )
    return _Word(ids.device, tuple(first), tuple(known))
