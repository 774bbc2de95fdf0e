"""Random numbers that are functions of a seed and counters, in plain PyTorch.

Source: Salmon et al. 2011 (Philox 4x32-10), as in Triton's ``tl.philox``.
"""

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_KEYS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = (0xD2511F53, 0xCD9E8D57)


def philox(seed: Tensor, c0: Tensor, c1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit outputs for the counters ``(c0, c1, 0, 0)``, int64.

    Args:
        seed: One int64.
        c0: Of 32 bits, int64, any shape.
        c1: As ``c0``.
    """
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        low_0, high_0 = _multiply(c0, _ROUNDS[0])
        low_2, high_2 = _multiply(c2, _ROUNDS[1])
        c0, c1, c2, c3 = high_2 ^ c1 ^ k0, low_2, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _KEYS[0]) & _LOW, (k1 + _KEYS[1]) & _LOW
    return c0, c1, c2, c3


def _multiply(a: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """Low and high halves of a product of 32-bit numbers, without passing 63 bits."""
    low = a * (constant & 0xFFFF)
    high = a * (constant >> 16) + (low >> 16)
    return ((high & 0xFFFF) << 16) | (low & 0xFFFF), high >> 16
