"""Gradients of attention within each word of a pack, in plain PyTorch."""

import torch
from torch import Tensor

from tli_engine.reference.word_attention import rotate, scores_of, words_by_length


def word_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    bounds: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> Tensor:
    """Return dq, dk and dv side by side, ``[T, Hq + 2 Hkv, D]``, as one projection would have made them.

    The arguments are those of :func:`tli_engine.reference.word_attention.word_attention`, what it
    returned, and the gradient of ``out``.
    """
    acc = lse.dtype
    T, heads, D = q.shape
    group = heads // k.shape[1]
    q_rotated = rotate(q.to(acc), cos, sin)
    k_rotated = rotate(k.to(acc), cos, sin).repeat_interleave(group, dim=1)
    v = v.to(acc).repeat_interleave(group, dim=1)
    dout = dout.to(acc)
    delta = (dout * out.to(acc)).sum(-1)
    dq, dk, dv = (torch.empty(T, heads, D, dtype=acc, device=q.device) for _ in range(3))
    for rows in words_by_length(bounds):
        scores = scores_of(q_rotated[rows], k_rotated[rows], scale)
        p = (scores - lse[rows].transpose(1, 2)[..., None]).exp()
        dp = torch.einsum("snhd,smhd->shnm", dout[rows], v[rows])
        ds = scale * p * (dp - delta[rows].transpose(1, 2)[..., None])
        dq[rows] = torch.einsum("shnm,smhd->snhd", ds, k_rotated[rows])
        dk[rows] = torch.einsum("shnm,snhd->smhd", ds, q_rotated[rows])
        dv[rows] = torch.einsum("shnm,snhd->smhd", p, dout[rows])
    dk, dv = (x.view(T, heads // group, group, D).sum(2) for x in (dk, dv))
    # a rotation's transpose is the rotation back
    return torch.cat([rotate(dq, cos, -sin), rotate(dk, cos, -sin), dv], dim=1).to(q.dtype)
