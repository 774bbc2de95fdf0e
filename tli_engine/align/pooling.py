"""From hidden states of tokens to one vector a word."""

import torch
from torch import Tensor

from tli_engine.config import Pooling
from tli_engine.data.words import Pack


def pooling_weight(pack: Pack, pooling: Pooling) -> Tensor:
    """Weight of each token in the mean over its word, ``[T]``, fp32.

    - ``paper``: every token, special ones too, as the published training and pilot do. Where the
      first token carries a massive activation, all words then look alike.
    - ``content``: the word's own tokens.
    - ``last``: the last of them.
    - ``weighted``: its own tokens, the i-th one weighing i (Muennighoff 2022, SGPT).
    """
    if pooling == "paper":
        return torch.ones_like(pack.content, dtype=torch.float32)
    rank = pack.content.cumsum(0)
    # content tokens before each word, so that ranks start at 1 in every word
    before = torch.nn.functional.pad(rank, (1, 0))[pack.offsets]
    lengths = pack.offsets.diff()
    rank = rank - torch.repeat_interleave(before[:-1], lengths)
    if pooling == "last":
        total = torch.repeat_interleave(before.diff(), lengths)
        return (pack.content & (rank == total)).float()
    if pooling == "weighted":
        return (rank * pack.content).float()
    return pack.content.float()
