"""Causal attention inside each word of a pack, as an attention function of transformers."""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tli_engine.data.words import Pack

NAME = "tli_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    pack: Pack,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each word of ``pack``; q, k, v are ``[1, H, T, D]``, the result ``[1, T, H, D]``.

    The words are laid side by side, short ones filled up behind their end, where a causal mask
    hides the filling from every real token. One word alone takes transformers' own path.
    """
    options = {"dropout": dropout, "scaling": scaling}
    if pack.words == 1:
        alone: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, None, **options
        )
        return alone
    side_by_side = (x[0].transpose(0, 1)[pack.rows].transpose(1, 2) for x in (query, key, value))
    out, _ = sdpa_attention_forward(module, *side_by_side, None, **options)
    return out.flatten(0, 1)[pack.slots].unsqueeze(0), None


AttentionInterface.register(NAME, packed_attention)
