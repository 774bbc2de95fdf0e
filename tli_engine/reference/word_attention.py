"""Causal attention within each word of a pack, rotary embedding included, in plain PyTorch."""

from collections.abc import Iterator

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x`` ``[T, H, D]`` by the angles of each token; ``cos`` and ``sin`` are ``[T, D/2]``.

    Dimension i is paired with i + D/2, as in transformers' Llama.
    """
    a, b = x.chunk(2, dim=-1)
    c, s = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    return torch.cat([a * c - b * s, b * c + a * s], dim=-1)


def words_by_length(bounds: Tensor) -> Iterator[Tensor]:
    """Yield the rows of all words of one length, ``[S, length]``, for each length there is."""
    start, end = bounds.long()
    first = (start == torch.arange(len(start), device=start.device)).nonzero()[:, 0]
    length = (end - start)[first]
    for n in length.unique().tolist():
        yield first[length == n][:, None] + torch.arange(n, device=start.device)


def word_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, bounds: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output and each row's log of the sum of exponentials.

    The arguments are those of :func:`tli_engine.ops.word_attention`, with ``cos`` and ``sin``
    ``[T, D/2]``; the logarithms are ``[T, Hq]`` in fp32, or fp64 for fp64 input.
    """
    acc = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=acc, device=q.device)
    q = rotate(q.to(acc), cos, sin)
    k = rotate(k.to(acc), cos, sin).repeat_interleave(group, dim=1)
    v = v.to(acc).repeat_interleave(group, dim=1)
    for rows in words_by_length(bounds):
        scores = scores_of(q[rows], k[rows], scale)
        total = scores.logsumexp(-1)
        lse[rows] = total.transpose(1, 2)
        p = (scores - total[..., None]).exp()
        out[rows] = torch.einsum("shnm,smhd->snhd", p, v[rows]).to(out.dtype)
    return out, lse


def scores_of(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Causal scores ``[S, H, L, L]`` of words ``[S, L, H, D]``; -inf where a key comes later."""
    scores = torch.einsum("snhd,smhd->shnm", q, k) * scale
    length = q.shape[1]
    later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, -torch.inf)
