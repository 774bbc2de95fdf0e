"""Bytes that a decoder block keeps for the way back, and what its gradient takes for a moment."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tli_engine.models.adapters import adapters
from tli_engine.models.arrangement import Part, again, held
from tli_engine.models.lora import LoRALinear
from tli_engine.train.plan_outline import Outline
from tli_engine.train.plan_products import Product

# rows from which products with NF4 weights decode them in full first on the way back
_DECODED_BACK = 2048
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
        back = self.tokens > _DECODED_BACK or not self._outline.target.hopper
        down, gate_up = (self._decoded(b.hidden * n * b.ffn, back) for n in (1, 2))
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

    def running(self, number: int, again: bool) -> int:
        """Bytes that sums in fp32 take while a block runs, beside all that it keeps; 0 without such sums.

        Those of gate and up, or of down: beside attention's, which are narrower, less is kept.

        Args:
            number: Of the block.
            again: Whether it is run again, beside a gradient and weights that :meth:`run_again` counts.
        """
        b, e, most = self.block, self._outline.element, 0
        adapted = self._adapted.get(number, {})
        # the gradient of the residual
        beside = b.hidden * e * again
        # what down reads is not there yet when gate and up run
        read = b.ffn * e * ("down_proj" in adapted)
        for product in self._products(adapted, _GATE_UP):
            if self._sums_in_fp32(product):
                decoded = 0 if again else self._decoded_there(product)
                # before the output is there, which is kept
                part = max(0, 4 * product.part - e * product.rows)
                taken = 4 * product.rows + part - read + beside
                most = max(most, taken * self.tokens + decoded)
        for product in self._products(adapted, _DOWN):
            if self._sums_in_fp32(product):
                # and rounded, which nothing keeps
                taken = 4 * product.rows + max(e * product.rows, 4 * product.part) + beside
                most = max(most, taken * self.tokens + self._decoded_there(product))
        return most

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
        adapted = self._adapted.get(number, {})
        # the last layer's is free again at the fullest moment
        of_part = [
            sum(self._decoded_there(p) for group in groups for p in self._products(adapted, group))
            for groups in ((_QKV, _O), (_GATE_UP,))
        ]
        if not self._outline.fused:
            of_part = [sum(of_part)]
        weights = [n for n, keep in zip(of_part, keeps, strict=True) if not keep]
        decoded = max(weights, default=0) if any(keeps) else sum(weights)
        return again(self.parts(number), keeps, self.input) + decoded

    def _products(
        self, adapted: dict[str, LoRALinear], group: tuple[str, ...]
    ) -> Sequence[Product]:
        """Those of layers that share an input: one, or one a layer by transformers' modules."""
        b = self.block
        rows = {"q_proj": b.q, "k_proj": b.kv, "v_proj": b.kv, "o_proj": b.hidden}
        rows |= {"gate_proj": b.ffn, "up_proj": b.ffn, "down_proj": b.hidden}
        columns = b.q if group == _O else b.ffn if group == _DOWN else b.hidden
        if self._outline.fused:
            # of layers without an adapter beside adapted ones it is zeros
            rank = next((adapted[name].r for name in group if name in adapted), 0)
            return [Product(columns, [rows[name] for name in group], rank)]
        ranks = {name: adapted[name].r if name in adapted else 0 for name in group}
        return [Product(columns, [rows[name]], ranks[name]) for name in group]

    def _sums_in_fp32(self, product: Product) -> bool:
        outline = self._outline
        # beside dense layers transformers' modules compute the update by itself
        ours = outline.nf4 or outline.fused
        if not ours or not outline.on_gpu or outline.element > 2:
            return False
        return product.sums_in_fp32(
            self.tokens, self._reads_nf4, outline.target.hopper, outline.run.numerics == "fast"
        )

    @property
    def _reads_nf4(self) -> bool:
        """Whether products read weights in NF4, of which no dense copies are held."""
        return self._outline.nf4 and self._outline.run.weight_residency != "bf16"

    def _decoded_there(self, product: Product) -> int:
        target, fast = self._outline.target, self._outline.run.numerics == "fast"
        return self._decoded(product.elements, product.decodes(self.tokens, target.hopper, fast))

    def _decoded(self, elements: int, decodes: bool) -> int:
        """Bytes of a weight decoded in full, if it is."""
        outline = self._outline
        return elements * outline.element * (decodes and outline.on_gpu and self._reads_nf4)
