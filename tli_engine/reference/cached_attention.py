"""``cached_attention_`` in plain PyTorch: CPU backend and test oracle; keeps fp64."""

import torch
from torch import Tensor


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, begin: Tensor, slot: Tensor,
    scale: float, window: int | None = None,
) -> Tensor:  # fmt: skip
    """As :func:`tli_engine.ops.cached_attention.cached_attention_`; arguments checked."""
    keys.index_copy_(1, slot, k[:, None])
    values.index_copy_(1, slot, v[:, None])
    slots = torch.arange(keys.shape[1], device=q.device)
    first = begin[:, None]
    if window is not None:
        first = first.maximum(slot - (window - 1))
    hidden = (slots < first) | (slots > slot)
    dtype = q.dtype if q.dtype == torch.float64 else torch.float32
    # what lies in hidden slots may be anything, and 0 times NaN is none
    held_keys, held_values = (
        held.to(dtype).masked_fill(hidden[:, :, None, None], 0) for held in (keys, values)
    )
    # the queries of one key head are rows of one product: no key is repeated
    grouped = q.to(dtype).reshape(len(q), k.shape[1], q.shape[1] // k.shape[1], q.shape[2])
    scores = scale * grouped @ held_keys.permute(0, 2, 3, 1)
    weights = scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1)
    out: Tensor = weights @ held_values.transpose(1, 2)
    return out.flatten(1, 2).to(q.dtype)
