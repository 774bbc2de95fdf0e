"""Words to vectors: every layer asked for in one pass, pooled as each layer comes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tli_engine.align.pooling import pooling_weight
from tli_engine.config import Pooling
from tli_engine.data.words import Pack, Word, pack, packs_of
from tli_engine.models.early import EarlyModel
from tli_engine.ops import segment_mean

# tokens a pack: enough to fill the matmuls, small enough for the caches of a CPU
_PACK_TOKENS = 1024


def pool(hidden: Tensor, words: Pack, pooling: Pooling) -> Tensor:
    """Vectors of a pack's words from one layer's hidden states: ``[T, D]`` to ``[S, D]``, fp32."""
    return segment_mean(hidden, pooling_weight(words, pooling), words.offsets)


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
    number = {word: i for i, word in enumerate(dict.fromkeys(words))}
    distinct = list(number)
    shape = (len(poolings), len(layers), len(distinct), model.config.hidden_size)
    vectors = torch.empty(shape, device=model.device)
    row_of = {layer: row for row, layer in enumerate(layers)}
    for members in packs_of(distinct, _PACK_TOKENS):
        words_in_pack = pack([distinct[i] for i in members]).to(model.device)
        for layer, hidden in model.hidden_states(words_in_pack):
            if layer in row_of:
                for of_pooling, pooling in zip(vectors, poolings, strict=True):
                    pooled = pool(hidden, words_in_pack, pooling)
                    of_pooling[row_of[layer], members] = pooled.float()
            if layer == layers[-1]:
                break
        advance(len(members))
    return vectors[:, :, [number[word] for word in words]]
