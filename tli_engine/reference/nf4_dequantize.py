"""NF4 back to floating point, in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tli_engine.nf4 import NestedAbsmax, NF4Weight


def nf4_dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    block_size: int,
    nested_block_size: int,
) -> Tensor:
    """Return the weight; see :func:`tli_engine.ops.nf4_dequantize`. fp64 holds the fp32 values."""
    nested = None
    if nested_absmax is not None and nested_code is not None and nested_offset is not None:
        offset = nested_offset.view(())
        nested = NestedAbsmax(nested_absmax, nested_code, offset, nested_block_size)
    weight = NF4Weight(packed, absmax, tuple(shape), torch.float32, block_size, nested)
    if dtype == torch.float64:
        return weight.dequantize(torch.float32).double()
    return weight.dequantize(dtype)
