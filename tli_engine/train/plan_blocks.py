"""Bytes that a decoder block keeps for the way back, and what its gradient takes for a moment."""

from dataclasses import dataclass
from typing import Any

from tli_engine.models.adapters import adapters
from tli_engine.models.lora import LoRALinear
from tli_engine.train.plan_outline import Outline

# rows from which products with NF4 weights decode them in full first: on the way back and, exact, there
_DECODED_BACK, _DECODED_THERE = 2048, 6144
_QKV, _GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


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
        of_token = self._kept_fused if self._outline.fused else self._kept_by_modules
        return self.tokens * of_token(self._adapted.get(number, {}))

    def _kept_fused(self, adapted: dict[str, LoRALinear]) -> int:
        """Bytes a token."""
        b, full = self.block, self._outline.run.method == "full"
        elements = 2 * b.ffn + b.hidden + b.q + (b.q + 2 * b.kv)
        # reciprocal roots of two norms, and the log-sum-exp of each head
        floats = 2 + b.heads[0]
        if b.head_norms:
            # copies that the norms read, and what attention reads
            elements += 2 * (b.q + b.kv)
            floats += sum(b.heads)
        if b.sandwich:
            elements += 2 * b.hidden
            floats += 2
        if self._copies:
            grouped = b.heads[0] != b.heads[1]
            # nothing then holds the projection that values were a part of
            elements += grouped * (2 * b.q - b.head_norms * (b.q + 3 * b.kv))
            elements += b.q * (full or "o_proj" in adapted)
        for group, read in ((_QKV, b.hidden), (_GATE_UP, b.hidden), (("down_proj",), b.ffn)):
            if full or any(name in adapted for name in group):
                elements += read
        for group in (_QKV, ("o_proj",), _GATE_UP, ("down_proj",)):
            ranks = [adapted[name].r for name in group if name in adapted]
            elements += len(group) * ranks[0] if ranks else 0
        return self._outline.element * elements + 4 * floats

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
        outline = self._outline
        if outline.causal is None:
            return False
        slow = not outline.on_gpu or outline.element > 2
        return slow or outline.run.sft.attention == "sdpa"

    def working(self) -> int:
        """Bytes of gradients within a block at its fullest moment, and of a weight decoded for it."""
        b, e = self.block, self._outline.element
        down, gate_up = (self._decoded(b.hidden * n * b.ffn, _DECODED_BACK) for n in (1, 2))
        # of the residual, beside: through the gate; through down; through gate and up, whose
        # outputs are kept no longer
        return max(
            (b.hidden + 3 * b.ffn) * e * self.tokens,
            (2 * b.hidden + b.ffn) * e * self.tokens + down,
            2 * b.hidden * e * self.tokens + gate_up,
        )

    def run_again(self, number: int) -> int:
        """Bytes that a block's second run adds to its input: what it keeps, weights decoded once."""
        b, adapted = self.block, self._adapted.get(number, {})
        weights = b.hidden * (2 * b.q + 2 * b.kv + 2 * b.ffn)
        # its last layer is left out where it keeps nothing
        weights += b.hidden * b.ffn * ("down_proj" in adapted or b.sandwich)
        return self.kept(number) + self._decoded(weights, _DECODED_THERE)

    def _decoded(self, elements: int, rows: int) -> int:
        outline = self._outline
        if not outline.nf4 or not outline.on_gpu:
            return 0
        if outline.run.weight_residency == "bf16":
            return 0
        decodes = self.tokens > rows or not outline.target.hopper
        return elements * outline.element if decodes else 0
