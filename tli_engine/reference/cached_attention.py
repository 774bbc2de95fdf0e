"""``cached_attention_`` in plain PyTorch: CPU backend and test oracle; keeps fp64."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


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
    mask = q.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None, None]
    # the queries of one key head are rows of one product: no key is repeated
    grouped = q.reshape(len(q), k.shape[1], q.shape[1] // k.shape[1], q.shape[2])
    out = scaled_dot_product_attention(
        grouped, keys.transpose(1, 2), values.transpose(1, 2),
        attn_mask=mask.expand(-1, 1, grouped.shape[2], -1), scale=scale,
    )  # fmt: skip
    return out.flatten(1, 2).contiguous()
