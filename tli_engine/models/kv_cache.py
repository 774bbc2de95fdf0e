"""Keys and values of texts that are being continued, in static memory, and attention over them."""

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tli_engine.models.document_attention import Documents

# what takes a mask that rows share, on a GPU
_WITH_A_MASK = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class KVCache:
    """Keys and values of ``rows`` texts at every block, all memory taken at once.

    Prompts end at one slot, ``prompt - 1``; what is generated follows, so that a step writes one slot
    of all rows. What the device needs to know of a step is on the device.

    Attributes:
        keys: ``[blocks, rows, slots, Hkv, D]``.
        values: As ``keys``.
        prompt: Slots of the prompts: tokens of the longest.
        begin: Slot of each row's first token, ``[rows]``, int64.
        slot: Slot that the next step writes, ``[1]``, int64.
        filled: Slots that are written, of the longest row.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        rows = torch.arange(self.rows, device=keys.device)
        self.begin, self.slot = torch.zeros_like(rows), rows.new_zeros(1)
        self.prompt = self.filled = 0
        self._first = rows * self.slots

    def restart(self, prompt: int, begin: Tensor) -> None:
        """Forget all texts; prompts of new ones, of ``prompt`` tokens at most, begin at slots ``begin``."""
        # a slot that no one has written is weighted by 0, and 0 times NaN is none
        self.keys.zero_(), self.values.zero_()
        self.begin.copy_(begin)
        self.slot.fill_(prompt)
        self.prompt = self.filled = prompt

    @property
    def rows(self) -> int:
        """Texts."""
        return self.keys.shape[1]

    @property
    def slots(self) -> int:
        """Tokens of a row that there is room for."""
        return self.keys.shape[2]

    @property
    def positions(self) -> Tensor:
        """Position of the next step's token in each text, ``[rows]``."""
        return self.slot - self.begin

    def store(self, block: int, at: Tensor, k: Tensor, v: Tensor) -> None:
        """Write keys and values, ``[T, Hkv, D]``, at slots counted over all rows, ``[T]``."""
        self.keys[block].flatten(0, 1).index_copy_(0, at, k)
        self.values[block].flatten(0, 1).index_copy_(0, at, v)

    def next_slots(self) -> Tensor:
        """The slots that the next step writes, counted over all rows, ``[rows]``."""
        return self._first + self.slot

    def advance(self) -> None:
        """Take note that a step has written its slot."""
        self.slot += 1
        self.filled += 1

    def reorder(self, sources: Tensor) -> None:
        """Let each row go on from what row ``sources`` of its own prompt has generated, ``[rows]``."""
        if self.filled == self.prompt:
            return
        for held in (self.keys, self.values):
            generated = held[:, :, self.prompt : self.filled]
            generated.copy_(generated.index_select(1, sources))


@dataclass(frozen=True)
class Prefill:
    """Attends within prompts, and keeps their keys and values.

    Attributes:
        documents: The prompts.
        cache: Where to.
        block: Number of the block that attends.
        at: Slots of the prompts' tokens, ``[copies, T]``; each prompt is kept so many times.
    """

    documents: Documents
    cache: KVCache
    block: int
    at: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """As :meth:`Documents.attend`."""
        for at in self.at:
            self.cache.store(self.block, at, k, v)
        return self.documents.attend(q, k, v, scale, window)


@dataclass(frozen=True)
class Step:
    """What all blocks share in a step: the cache, and what each row sees.

    Attributes:
        cache: Of the texts.
        at: Slots that are written.
        seen: Slots that are read; a number, so that a CUDA graph has static shapes.
    """

    cache: KVCache
    at: Tensor
    seen: int
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor:
        """0 at slots that each row's new token sees, else minus infinity, ``[rows, 1, 1, seen]``."""
        if window not in self._masks:
            cache = self.cache
            slots = torch.arange(self.seen, device=cache.slot.device)
            first = cache.begin[:, None]
            if window is not None:
                first = first.maximum(cache.slot - (window - 1))
            hidden = (slots < first) | (slots > cache.slot)
            mask = cache.keys.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
            self._masks[window] = mask[:, None, None]
        return self._masks[window]


@dataclass(frozen=True)
class CachedAttention:
    """Attends from one new token a row to all that is kept of the row, at one block."""

    step: Step
    block: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """Keep ``k`` and ``v``, ``[rows, Hkv, D]``, and attend; arguments as :meth:`Documents.attend`."""
        step, cache = self.step, self.step.cache
        cache.store(self.block, step.at, k, v)
        keys, values = (
            held[self.block, :, : step.seen].transpose(1, 2) for held in (cache.keys, cache.values)
        )
        # the queries of one key head are rows of one product: no key is repeated
        grouped = q.reshape(len(q), k.shape[1], -1, q.shape[2])
        if window is not None and window >= step.seen:
            window = None
        mask = step.mask(window).expand(-1, 1, grouped.shape[2], -1)
        with sdpa_kernel(_WITH_A_MASK) if q.is_cuda else nullcontext():
            out = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
        return out.flatten(1, 2)
