"""Calls of one word that were made before: their hidden states are held, and computed on from there.

A scan that calls the model on one word anew for every layer then runs each block once a word. What
is handed out are copies, bit for bit what the call would compute: the same blocks on the same tensors.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tli_engine.integrations.call_state import CallState
from tli_engine.integrations.lazy_run import LazyRun
from tli_engine.integrations.weight_writes import writes

# a word and its presentation; a longer text is hardly called twice
_LONGEST = 64
# hidden states held for all words of a model
_BYTES = 1 << 30
# arguments of a call that is served; of others nothing is known
_KNOWN = {"input_ids", "attention_mask", "output_hidden_states", "return_dict", "use_cache"}

Key = tuple[object, ...]


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
        self._seen: tuple[CallState, int] | None = None

    def __len__(self) -> int:
        return len(self._runs)

    def find(
        self, arguments: Mapping[str, Any], state: CallState, make: Callable[[], LazyRun]
    ) -> tuple[LazyRun, Callable[[int], Tensor]] | None:
        """The run of a call, an earlier one if there was, and what reads its hidden states.

        ``None`` for a call that is not of one word, is trained through, or drops out.
        """
        tokens = None if state.grad or any(state.training) else _tokens(arguments)
        if tokens is None:
            return None
        if self._seen is None or self._seen[1] != writes() or not state.same_weights(self._seen[0]):
            self._runs.clear()
            self._sizes.clear()
        self._seen = state, writes()
        key = (*tokens, *state.key)
        run = self._runs.get(key)
        if run is None:
            run = self._runs[key] = make()
        self._runs.move_to_end(key)
        read: dict[int, Tensor] = {}

        def hidden_state(k: int) -> Tensor:
            if k not in read:
                # the caller may write to what it gets
                read[k] = self._read(key, run, k).clone()
            return read[k]

        return run, hidden_state

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
        for key in list(self._runs):
            if held <= self._limit:
                return
            run = self._runs[key]
            if key in self._sizes and len(run.states) > 1:
                run.states = {run.reached: run.states[run.reached]}
                held -= self._sizes[key] - run.states[run.reached].nbytes
                self._sizes[key] = run.states[run.reached].nbytes
        while held > self._limit and len(self._runs) > 1:
            key, _ = self._runs.popitem(last=False)
            held -= self._sizes.pop(key, 0)


def _tokens(arguments: Mapping[str, Any]) -> tuple[object, ...] | None:
    """Token ids and mask of a call on one short text, and where it runs; else ``None``."""
    ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    others = {name for name, value in arguments.items() if value is not None} - _KNOWN
    if others or not isinstance(ids, Tensor) or ids.ndim != 2 or len(ids) != 1:
        return None
    if not 1 <= ids.shape[1] <= _LONGEST:
        return None
    if mask is None:
        return (ids.device, tuple(ids[0].tolist()), None)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape or mask.device != ids.device:
        return None
    # one wait for the device, not two
    both = torch.stack([ids[0].long(), mask[0].long()]).tolist()
    return (ids.device, tuple(both[0]), (mask.dtype, *both[1]))
