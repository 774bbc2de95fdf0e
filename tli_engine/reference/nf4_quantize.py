"""A weight to NF4, in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from tli_engine import nf4


def nf4_quantize(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return ``(packed, absmax)``; see :func:`tli_engine.ops.nf4_quantize`."""
    if weight.numel() == 0:
        packed = torch.empty(0, 1, dtype=torch.uint8, device=weight.device)
        return packed, torch.empty(0, dtype=torch.float32, device=weight.device)
    finite = weight.isfinite()
    if finite.all():
        quantised = nf4.quantize(weight, block_size=block_size)
        return quantised.packed, quantised.absmax
    quantised = nf4.quantize(torch.where(finite, weight, 0), block_size=block_size)
    # a block with infinity or NaN shows it in its absmax, and only there
    flat = pad(weight.reshape(-1).float(), (0, -weight.numel() % block_size)).view(-1, block_size)
    largest = flat.abs().amax(1)
    return quantised.packed, torch.where(largest.isfinite(), quantised.absmax, largest)
