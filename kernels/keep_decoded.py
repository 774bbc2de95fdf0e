"""NF4 weights decoded for a block's second run, kept for its way back: one decoding serves both.

Only where a product takes a decoded weight; the fused kernels decode as they go.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_kept: dict[tuple[int, torch.dtype], Tensor] = {}
_keeping = False


def keep_decoded(keeping: bool, forget: bool) -> None:
    """Keep what is decoded from here on, or no longer; ``forget`` what was kept before."""
    global _keeping
    _keeping = keeping
    if forget:
        _kept.clear()


def for_forward(stored: Tensor, dtype: torch.dtype, decode: Callable[[], Tensor]) -> Tensor:
    """Decode a weight, and keep it if a block is run again."""
    weight = decode()
    if _keeping:
        _kept[stored.data_ptr(), dtype] = weight
    return weight


def for_backward(stored: Tensor, dtype: torch.dtype, decode: Callable[[], Tensor]) -> Tensor:
    """What was kept of a weight, which is given up, or the weight decoded anew."""
    weight = _kept.pop((stored.data_ptr(), dtype), None)
    return decode() if weight is None else weight
