"""Bytes that a decoder block keeps for the way back, and what its gradient takes for a moment."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tli_engine.models.adapters import adapters
from tli_engine.models.arrangement import Part, again, held
from tli_engine.models.lora import LoRALinear
from tli_engine.train.plan_outline import Outline

# rows from which products with NF4 weights decode them in full first: on the way back and, exact, there
_DECODED_BACK, _DECODED_THERE = 2048, 6144
_QKV, _O = ("q_proj", "k_proj", "v_proj"), ("o_proj",)
_GATE_UP, _DOWN = ("gate_proj", "up_proj"), ("down_proj",)


@dataclass(frozen=True)
class Block:
    """Sizes of a block of which all are alike, in elements a token.

    Attributes:
        hidden: Width.
        q: Queries.
        kv: Keys, or values.
        ffn: Half of the gated projection.
        heads: Of queries, and of keys.
        head_norms: Whether queries and keys are normed.
        sandwich: Whether what attention and MLP return is normed.
    """

    hidden: int
    q: int
    kv: int
    ffn: int
    heads: tuple[int, int]
    head_norms: bool
    sandwich: bool

    @classmethod
    def of(cls, outline: Outline) -> "Block":
        """The model's."""
        block: Any = outline.early.blocks[0]
        attention, linear = block.self_attn, outline.linear
        q, kv = (linear[f"layers.0.self_attn.{n}"][0] for n in ("q_proj", "k_proj"))
        size = attention.head_dim
        return cls(
            outline.config.hidden_size,
            q,
            kv,
            linear["layers.0.mlp.gate_proj"][0],
            (q // size, kv // size),
            hasattr(attention, "q_norm"),
            hasattr(block, "pre_feedforward_layernorm"),
        )


class BlockMemory:
    """What the blocks of a run keep and take, for packs of some tokens.

    Args:
        outline: The run.
        tokens: Of a pack.
    """

    def __init__(self, outline: Outline, tokens: int) -> None:
        self._outline = outline
        self.tokens, self.block = tokens, Block.of(outline)
        self._adapted: dict[int, dict[str, LoRALinear]] = {}
        for name, adapter in adapters(outline.early).items():
            of_block = self._adapted.setdefault(int(name.split(".")[1]), {})
            of_block[name.rpartition(".")[2]] = adapter

    @property
    def input(self) -> int:
        """Bytes of what a block takes."""
        return self.tokens * self.block.hidden * self._outline.element

    def kept(self, number: int) -> int:
        """Bytes that a block keeps beyond its input."""
        parts = self.parts(number)
        return held(parts, [True] * len(parts), self.input)

    def parts(self, number: int) -> list[Part]:
        """The parts of a block: what each keeps beyond its input, and what its second run takes."""
        adapted = self._adapted.get(number, {})
        if not self._outline.fused:
            return [Part(self.tokens * self._kept_by_modules(adapted), 1.0)]
        assert self._outline.early.fused is not None
        longest = min(self.tokens, self._outline.run.sft.context)
        work = self._outline.early.fused.blocks[number].work(self.tokens, longest)
        kept = self._kept_by_attention(adapted), self._kept_after_attention(adapted)
        return [Part(self.tokens * k, w) for k, w in zip(kept, work, strict=True)]

    def _kept_by_attention(self, adapted: dict[str, LoRALinear]) -> int:
        """Bytes a token of the first half of a block on the engine's ops."""
        b, full = self.block, self._outline.run.method == "full"
        elements = b.q + (b.q + 2 * b.kv)
        # the reciprocal root of the norm, and the log-sum-exp of each head
        floats = 1 + b.heads[0]
        if b.head_norms:
            # copies that the norms read, and what attention reads
            elements += 2 * (b.q + b.kv)
            floats += sum(b.heads)
        if b.sandwich:
            elements += b.hidden
            floats += 1
        if self._copies:
            grouped = b.heads[0] != b.heads[1]
            # nothing then holds the projection that values were a part of
            elements += grouped * (2 * b.q - b.head_norms * (b.q + 3 * b.kv))
            elements += b.q * (full or "o_proj" in adapted)
        elements += self._kept_by_layers(adapted, {_QKV: b.hidden, _O: 0})
        return self._outline.element * elements + 4 * floats

    def _kept_after_attention(self, adapted: dict[str, LoRALinear]) -> int:
        """Bytes a token of the second half."""
        b = self.block
        elements = 2 * b.ffn + b.hidden * b.sandwich
        elements += self._kept_by_layers(adapted, {_GATE_UP: b.hidden, _DOWN: b.ffn})
        return self._outline.element * elements + 4 * (1 + b.sandwich)

    def _kept_by_layers(
        self, adapted: dict[str, LoRALinear], reads: dict[tuple[str, ...], int]
    ) -> int:
        """Elements a token that joined layers keep: what they read, unless it is kept anyway, and ``x A``."""
        elements = 0
        for group, read in reads.items():
            ranks = [adapted[name].r for name in group if name in adapted]
            if ranks or self._outline.run.method == "full":
                elements += read
            elements += len(group) * ranks[0] if ranks else 0
        return elements

    def _kept_by_modules(self, adapted: dict[str, LoRALinear]) -> int:
        """Bytes a token; transformers' modules compute norms, PEFT's way adapters, in fp32."""
        b, e, full = self.block, self._outline.element, self._outline.run.method == "full"
        elements = 3 * b.ffn + b.hidden + 2 * b.q + 2 * b.kv
        if b.heads[0] != b.heads[1]:
            # keys and values, repeated for each query head
            elements += 2 * (b.q - b.kv)
        head_norms = (b.q + b.kv) * b.head_norms
        norms = (4 if b.sandwich else 2) * b.hidden + head_norms
        # what a norm returns before its weight, where that is trained
        elements += head_norms + norms * full
        inputs = {"q_proj": b.hidden, "o_proj": 0, "gate_proj": b.hidden, "down_proj": b.ffn}
        own = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
        reads = {own.get(name, name) for name in adapted} if not full else set(inputs)
        elements += sum(inputs[name] for name in reads)
        floats = 2 + b.heads[0] + sum(adapter.r for adapter in adapted.values())
        if e < 4:
            floats += norms
            if not self._outline.nf4:
                floats += sum(a.lora_A.in_features for a in adapted.values())
        if b.sandwich:
            elements += 2 * b.hidden
        return e * elements + 4 * floats

    @property
    def _copies(self) -> bool:
        """Whether attention is sdpa's, which repeats keys and values, and joins its documents."""
        causal = self._outline.causal
        return causal is not None and causal.attention == "sdpa"

    def working(self, number: int) -> int:
        """Bytes of gradients within a block at its fullest moment, and of a weight decoded for it."""
        b, e = self.block, self._outline.element
        down, gate_up = (self._decoded(b.hidden * n * b.ffn, _DECODED_BACK) for n in (1, 2))
        # what down has read is free once its own gradients are there
        full = self._outline.run.method == "full"
        read = b.ffn if full or "down_proj" in self._adapted.get(number, {}) else 0
        # of the residual, beside: through the gate; through down; through gate and up, whose
        # outputs are kept no longer
        return max(
            (b.hidden + 3 * b.ffn - read) * e * self.tokens,
            (2 * b.hidden + b.ffn) * e * self.tokens + down,
            2 * b.hidden * e * self.tokens + gate_up,
        )

    def reserved(self) -> int:
        """Bytes that a run leaves for a block's way back when it decides what blocks keep."""
        fused = self._outline.early.fused
        if fused is None:
            return max(
                map(self.kept, range(self._outline.first_trained, self._outline.early.depth))
            )
        of_token, decoded = fused.blocks[0].working(self._outline.element, self._outline.nf4)
        return self.tokens * of_token + decoded

    def run_again(self, number: int, keeps: Sequence[bool]) -> int:
        """Bytes that second runs add at the most: what they keep, weights decoded once."""
        b = self.block
        # the last layer's is free again at the fullest moment
        of_part = [b.hidden * (2 * b.q + 2 * b.kv), b.hidden * 2 * b.ffn]
        if not self._outline.fused:
            of_part = [sum(of_part)]
        weights = [n for n, keep in zip(of_part, keeps, strict=True) if not keep]
        together = max(weights, default=0) if any(keeps) else sum(weights)
        decoded = self._decoded(together, _DECODED_THERE)
        return again(self.parts(number), keeps, self.input) + decoded

    def _decoded(self, elements: int, rows: int) -> int:
        outline = self._outline
        if not outline.nf4 or not outline.on_gpu:
            return 0
        if outline.run.weight_residency == "bf16":
            return 0
        decodes = self.tokens > rows or not outline.target.hopper
        return elements * outline.element if decodes else 0
