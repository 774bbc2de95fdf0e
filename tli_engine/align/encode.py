"""Words to vectors: every layer asked for in one pass, pooled as each layer comes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tli_engine.align.pooling import pooling_weight
from tli_engine.config import Pooling
from tli_engine.data.words import Pack, Word, pack, packs_of
from tli_engine.models.early import EarlyModel
from tli_engine.ops import segment_mean

# tokens a pack: enough to fill the matmuls, small enough for the caches of a CPU
_PACK_TOKENS = 1024
# on a GPU a launch costs as much as many tokens
_PACK_TOKENS_GPU = 8192
# values of a pack between the two halves of an MLP, on a GPU: 128 MB in bf16
_MLP_VALUES = 1 << 26


def pool(hidden: Tensor, words: Pack, pooling: Pooling) -> Tensor:
    """Vectors of a pack's words from one layer's hidden states: ``[T, D]`` to ``[S, D]``, fp32."""
    return segment_mean(hidden, pooling_weight(words, pooling), words.offsets)


@dataclass(frozen=True)
class StagedPack:
    """A pack on the model's device, with what every layer needs of it.

    Attributes:
        pack: The words.
        rows: Their place among all words.
        weights: Of each token in the mean over its word, ``[T]`` a pooling.
    """

    pack: Pack
    rows: slice
    weights: list[Tensor]

    def pool(self, hidden: Tensor, vectors: Tensor) -> None:
        """Write the words' vectors by each pooling into ``[poolings, words, D]``."""
        for of_pooling, weight in zip(vectors, self.weights, strict=True):
            of_pooling[self.rows] = segment_mean(hidden, weight, self.pack.offsets)


@dataclass(frozen=True)
class Staged:
    """Distinct words in packs on the model's device, copied ahead so that no layer waits.

    Attributes:
        packs: Words of like length together.
        row_of: Place of each word; those of a pack lie together.
    """

    packs: list[StagedPack]
    row_of: dict[Word, int]

    @property
    def tokens(self) -> int:
        """Number of tokens of all words."""
        return sum(len(part.pack.input_ids) for part in self.packs)


def stage(model: EarlyModel, words: Sequence[Word], poolings: Sequence[Pooling]) -> Staged:
    """Put the distinct words into packs on the model's device."""
    distinct = list(dict.fromkeys(words))
    packs, row_of = [], dict[Word, int]()
    for members in packs_of(distinct, _pack_tokens(model, [len(word) for word in distinct])):
        together = pack([distinct[i] for i in members])
        weights = [
            pooling_weight(together, pooling).to(model.device, non_blocking=True)
            for pooling in poolings
        ]
        rows = slice(len(row_of), len(row_of) + len(members))
        packs.append(StagedPack(together.to(model.device), rows, weights))
        row_of |= {distinct[i]: rows.start + n for n, i in enumerate(members)}
    return Staged(packs, row_of)


def _pack_tokens(model: EarlyModel, lengths: list[int]) -> int:
    """Most tokens of a pack of words of these lengths."""
    if model.device.type == "cpu" or not lengths:
        return _PACK_TOKENS
    fit: int = _MLP_VALUES // model.config.intermediate_size
    most = max(_PACK_TOKENS, min(_PACK_TOKENS_GPU, fit))
    # packs of like size: a small last one would read all weights for little
    packs = -(-sum(lengths) // most)
    return -(-sum(lengths) // packs) + max(lengths)


def encode(
    model: EarlyModel,
    words: Sequence[Word],
    layers: Sequence[int],
    pooling: Pooling,
    advance: Callable[[int], None] = lambda words: None,
) -> Tensor:
    """Return the vectors of words at several layers; equal words are run once.

    Args:
        model: Has at least ``max(layers)`` blocks.
        words: Presented and tokenised words.
        layers: ``hidden_states`` indices, ascending.
        pooling: How a word's tokens become one vector.
        advance: Called with the number of words done after each pack.

    Returns:
        ``[layers, words, D]``, fp32, on the model's device.
    """
    return encode_poolings(model, words, layers, [pooling], advance)[0]


@torch.no_grad()
def encode_poolings(
    model: EarlyModel,
    words: Sequence[Word],
    layers: Sequence[int],
    poolings: Sequence[Pooling],
    advance: Callable[[int], None] = lambda words: None,
) -> Tensor:
    """Return the vectors by several poolings, ``[poolings, layers, words, D]``, from one pass."""
    staged = stage(model, words, poolings)
    shape = (len(poolings), len(layers), len(staged.row_of), model.config.hidden_size)
    vectors = torch.empty(shape, device=model.device)
    place = {layer: n for n, layer in enumerate(layers)}
    for part in staged.packs:
        for layer, hidden in model.hidden_states(part.pack):
            if layer in place:
                part.pool(hidden, vectors[:, place[layer]])
            if layer == layers[-1]:
                break
        advance(part.pack.words)
    return vectors[:, :, [staged.row_of[word] for word in words]]
