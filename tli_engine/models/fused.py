"""A decoder's blocks on the engine's ops: a norm with its residual, joined projections, attention.

Ten launches a block, where transformers' modules make some forty, and gradients only where the loss
needs them. The weights are the model's own: see :class:`tli_engine.models.projection.Projection`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tli_engine.data.words import Laid, Pack
from tli_engine.models.document_attention import Attention, Documents
from tli_engine.models.norm import Norm
from tli_engine.models.packed_attention import Attends
from tli_engine.models.projection import NotFusedError, Projection
from tli_engine.nn import NF4Linear
from tli_engine.ops import (
    joined_word_attention,
    rotary,
    swiglu,
    word_attention,
    word_bounds,
)

_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class Rows:
    """What attention needs to know of the rows of a pack.

    Attributes:
        cos: Cosines of each row's angles, by rotary embedding, ``[T, D / 2]``.
        sin: Sines, as ``cos``.
        bounds: Of each row's word; see :func:`tli_engine.ops.word_bounds`. None in documents.
        documents: What attends where the rows are of documents; blocks then attend within windows.
    """

    cos: dict[str, Tensor]
    sin: dict[str, Tensor]
    bounds: Tensor | None
    documents: Attends | None = None


class FusedBlock:
    """One decoder block on packed words.

    Raises:
        NotFusedError: The block has a part that the ops do not know.
    """

    def __init__(self, block: Any, config: Any, number: int) -> None:
        attention, mlp = block.self_attn, block.mlp
        name = f"layers.{number}"
        self.rotary = _rotary_type(config, number)
        self.qkv = Projection(attention, f"{name}.self_attn", ("q_proj", "k_proj", "v_proj"))
        self.o = Projection(attention, f"{name}.self_attn", ("o_proj",))
        self.gate_up = Projection(mlp, f"{name}.mlp", ("gate_proj", "up_proj"))
        self.down = Projection(mlp, f"{name}.mlp", ("down_proj",))
        self._head_dim: int = attention.head_dim
        self._scale: float = attention.scaling
        self._window = _window(attention, config)
        self._heads = [size // self._head_dim for size in self.qkv.sizes]
        self._act = _ACTIVATIONS[_activation(config)]
        self._before_attention = Norm(block.input_layernorm)
        sandwich = hasattr(block, "pre_feedforward_layernorm")
        before_mlp = "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"
        self._before_mlp = Norm(getattr(block, before_mlp))
        self._after_attention = Norm(block.post_attention_layernorm) if sandwich else None
        self._after_mlp = Norm(block.post_feedforward_layernorm) if sandwich else None
        has_head_norms = hasattr(attention, "q_norm")
        self._q_norm = Norm(attention.q_norm) if has_head_norms else None
        self._k_norm = Norm(attention.k_norm) if has_head_norms else None

    @property
    def projections(self) -> tuple[Projection, Projection, Projection, Projection]:
        """In the order in which they run."""
        return self.qkv, self.o, self.gate_up, self.down

    @property
    def drops(self) -> int:
        """Projections that take a seed when the block runs."""
        return sum(projection.drops for projection in self.projections)

    def attention(
        self, x: Tensor, residual: Tensor | None, rows: Rows, seeds: Iterator[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the first half: what attention adds to the residual, ``[T, D]``, and the residual."""
        y, residual = _normed(self._before_attention, x, residual)
        x = self.o(self._attend(self._project(self.qkv, y, seeds), rows), _seed(self.o, seeds))
        if self._after_attention is not None:
            x = self._after_attention(x)[0]
        return x, residual

    def gated(
        self, x: Tensor, residual: Tensor | None, seeds: Iterator[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the second half up to what ``down`` reads, ``[T, intermediate]``, and the residual."""
        y, residual = _normed(self._before_mlp, x, residual)
        return swiglu(self._project(self.gate_up, y, seeds), act=self._act), residual

    def put_out(self, gated: Tensor, seeds: Iterator[Tensor] | None = None) -> Tensor:
        """Run the last layer on what :meth:`gated` returned: what the MLP adds, ``[T, D]``."""
        x = self._project(self.down, gated, seeds)
        return x if self._after_mlp is None else self._after_mlp(x)[0]

    def work(self, tokens: int, longest: int) -> tuple[float, float]:
        """Operations of the two halves, ``down`` left out, on documents of so many tokens at most.

        Attention's products run at about half the rate of others, and count twice.
        """
        linear = [
            2.0 * tokens * p.layer.out_features * p.layer.in_features for p in self.projections
        ]
        # half of the pairs are masked
        pairs = tokens * min(longest, self._window or longest) / 2
        return linear[0] + linear[1] + 2 * 4 * pairs * self._heads[0] * self._head_dim, linear[2]

    def working(self, element: int, nf4: bool | None = None) -> tuple[int, int]:
        """Bytes of gradients within the block at its fullest moment, a token, and of a decoded weight.

        ``nf4``: whether its weights are to be NF4; by default whether they are.
        """
        hidden, ffn = self.down.layer.out_features, self.down.layer.in_features
        nf4 = isinstance(self.gate_up.layer, NF4Linear) if nf4 is None else nf4
        return (hidden + 3 * ffn) * element, hidden * 2 * ffn * element * nf4

    @property
    def ends_freely(self) -> bool:
        """Whether the way back needs nothing of what the last layer, ``down``, reads and returns."""
        return self._after_mlp is None and not self.down.keeps_input

    def __call__(
        self, x: Tensor, residual: Tensor | None, rows: Rows, seeds: Iterator[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the block on ``x + residual``; the sum of what it returns is its output.

        Args:
            x: ``[T, D]``.
            residual: ``[T, D]``, or None.
            rows: Of the pack.
            seeds: One for each projection that drops, in order; drawn if None.
        """
        gated, residual = self.gated(*self.attention(x, residual, rows, seeds), seeds)
        return self.put_out(gated, seeds), residual

    def _project(self, layer: Projection, x: Tensor, seeds: Iterator[Tensor] | None) -> Tensor:
        return layer(x, _seed(layer, seeds))

    def _attend(self, qkv: Tensor, rows: Rows) -> Tensor:
        heads = qkv.view(len(qkv), -1, self._head_dim)
        if rows.documents is not None:
            return self._attend_in_documents(heads, rows, rows.documents)
        assert rows.bounds is not None
        tokens = rows.cos[self.rotary], rows.sin[self.rotary], rows.bounds
        if self._q_norm is None or self._k_norm is None:
            out = joined_word_attention(heads, self._heads, *tokens, scale=self._scale)
        else:
            q, k, v = torch.split(heads, self._heads, dim=1)
            q, k = self._q_norm.heads(q), self._k_norm.heads(k)
            out = word_attention(q, k, v, *tokens, scale=self._scale)
        return out.flatten(1)

    def _attend_in_documents(self, heads: Tensor, rows: Rows, documents: Attends) -> Tensor:
        angles = rows.cos[self.rotary], rows.sin[self.rotary]
        if self._q_norm is None or self._k_norm is None:
            rotated = rotary(heads, *angles, self._heads[0] + self._heads[1])
            q, k, v = torch.split(rotated, self._heads, dim=1)
        else:
            q, k, v = torch.split(heads, self._heads, dim=1)
            q, k = self._q_norm.heads(q), self._k_norm.heads(k)
            q, k = rotary(q, *angles), rotary(k, *angles)
        return documents.attend(q, k, v, self._scale, self._window).flatten(1)


class FusedBlocks:
    """The blocks of an ``EarlyModel``, adapters included, run by the engine's ops.

    Made after the adapters were put on; it moves the weights of joined layers.

    Raises:
        NotFusedError: A family, a projection or an adapter that the ops do not run.
    """

    def __init__(self, decoder: Any, config: Any, *, later: bool = False) -> None:
        """Put all blocks of ``decoder`` on the ops, or ``later`` each by :meth:`join`."""
        check_fused(config)
        self._decoder, self._config = decoder, config
        self.blocks: list[FusedBlock] = []
        for _ in [] if later else decoder.layers:
            self.join()

    def join(self) -> FusedBlock:
        """Put the next block on the ops, lowest first, where its weights are now."""
        number = len(self.blocks)
        self.blocks.append(FusedBlock(self._decoder.layers[number], self._config, number))
        return self.blocks[number]

    def rows_of(self, pack: Pack, like: Tensor) -> Rows:
        """What attention needs of a pack, for hidden states such as ``like``."""
        cos, sin = self.angles(pack.position_ids, like)
        return Rows(cos, sin, word_bounds(pack.offsets, len(pack.input_ids)))

    def document_rows(self, pack: Laid, like: Tensor, attention: Attention) -> Rows:
        """:meth:`rows_of` for a pack of documents, and what attends within them."""
        cos, sin = self.angles(pack.position_ids, like)
        return Rows(cos, sin, None, Documents.of(pack, attention))

    def angles(
        self, positions: Tensor, like: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Cosines and sines of positions, ``[T]``, for each kind of rotary embedding in use."""
        cos, sin = {}, {}
        for kind in dict.fromkeys(block.rotary for block in self.blocks):
            arguments = (kind,) if kind else ()
            angles = self._decoder.rotary_emb(like[None], positions[None], *arguments)
            # transformers' second half repeats the first
            cos[kind], sin[kind] = (a[0, :, : a.shape[-1] // 2].contiguous() for a in angles)
        return cos, sin

    def run(
        self,
        x: Tensor,
        rows: Rows,
        first: int,
        last: int,
        seeds: Iterator[Tensor] | None = None,
    ) -> Tensor:
        """Run blocks ``first … last - 1`` on hidden states, ``[T, D]``."""
        residual: Tensor | None = None
        for block in self.blocks[first:last]:
            x, residual = block(x, residual, rows, seeds)
        return x if residual is None else x + residual

    def final_norm(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The norm of ``x + residual`` that the output layer reads; for a model of all blocks."""
        return Norm(self._decoder.norm)(x, residual)[0]

    def projections(self) -> list[Projection]:
        """Of all blocks, in the order in which they run."""
        return [projection for block in self.blocks for projection in block.projections]


def check_fused(config: Any) -> None:
    """Raise :class:`NotFusedError` with a reason if the ops do not run this family of models."""
    if config.model_type not in _MODEL_TYPES:
        raise NotFusedError(f"no fused blocks for model type {config.model_type!r}")
    if _activation(config) not in _ACTIVATIONS:
        raise NotFusedError(f"no fused activation {_activation(config)!r}")
    if getattr(config, "attn_logit_softcapping", None):
        raise NotFusedError("attn_logit_softcapping is not fused")


def _activation(config: Any) -> str:
    name: str = getattr(config, "hidden_activation", None) or config.hidden_act
    return name


def _rotary_type(config: Any, block: int) -> str:
    """Which rotary embedding a block has, where there are several."""
    kind: str = config.layer_types[block] if config.model_type == "gemma3_text" else ""
    return kind


def _window(attention: Any, config: Any) -> int | None:
    """Tokens that a token sees in this block, itself included; None: all before it."""
    # Mistral's blocks are all alike
    owner = config if config.model_type == "mistral" else attention
    window: int | None = getattr(owner, "sliding_window", None)
    return window


def _normed(norm: Norm, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    return norm.fork(x) if residual is None else norm(x, residual)


def _seed(layer: Projection, seeds: Iterator[Tensor] | None) -> Tensor | None:
    return next(seeds) if seeds is not None and layer.drops else None
