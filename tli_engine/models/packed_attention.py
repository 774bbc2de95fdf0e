"""Causal attention inside each word or document of a pack, as an attention function of transformers."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tli_engine.data.words import Pack

NAME = "tli_packed"


class Attends(Protocol):
    """What attends within the documents of a pack at one block."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """As :meth:`tli_engine.models.document_attention.Documents.attend`."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    *,
    pack: Pack,
    documents: Attends | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each word of ``pack``; q, k, v are ``[1, H, T, D]``, the result ``[1, T, H, D]``.

    The words are laid side by side, short ones filled up behind their end, where a causal mask
    hides the filling from every real token. One word alone takes transformers' own path. In a word
    longer than ``sliding_window`` a token sees as many tokens, itself included. ``documents``, if
    given, attend instead.
    """
    if documents is not None:
        assert scaling is not None
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return documents.attend(q, k, v, scaling, sliding_window)[None], None
    options = {"dropout": dropout, "scaling": scaling}
    band = None
    if sliding_window is not None and pack.longest > sliding_window:
        band = window_mask(pack.longest, sliding_window, query.device)
    if pack.words == 1:
        alone: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, band, **options
        )
        return alone
    side_by_side = (x[0].transpose(0, 1)[pack.rows].transpose(1, 2) for x in (query, key, value))
    out, _ = sdpa_attention_forward(module, *side_by_side, band, **options)
    return out.flatten(0, 1)[pack.slots].unsqueeze(0), None


def window_mask(tokens: int, window: int, device: torch.device) -> Tensor:
    """Which of the tokens before it each token sees, itself included, ``[T, T]``, bool."""
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=device)
    return seen.tril_().triu_(1 - window)


AttentionInterface.register(NAME, packed_attention)
