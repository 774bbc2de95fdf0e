"""``tli_engine::nf4_dequantize``: schema, shape rules and backends."""

import torch
from torch import Tensor

from tli_engine import backends
from tli_engine.nf4 import DTYPES, NF4Weight
from tli_engine.reference.nf4_dequantize import nf4_dequantize as _reference

_OP = "tli_engine::nf4_dequantize"

torch.library.define(
    _OP,
    "(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, "
    "Tensor? nested_offset, SymInt[] shape, ScalarType dtype, int block_size, "
    "int nested_block_size) -> Tensor",
)


@torch.library.register_fake(_OP)
def _fake(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    shape: list[int],
    dtype: torch.dtype,
    block_size: int,
    nested_block_size: int,
) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


torch.library.impl(_OP, "CPU")(_reference)


@torch.library.impl(_OP, "CUDA")
def _cuda(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    shape: list[int],
    dtype: torch.dtype,
    block_size: int,
    nested_block_size: int,
) -> Tensor:
    nested = (nested_absmax, nested_code, nested_offset)
    launch = backends.resolve("nf4_dequantize")
    return launch(  # type: ignore[no-any-return]
        packed, absmax, *nested, shape, dtype, block_size, nested_block_size
    )


def nf4_dequantize(weight: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    r"""Return an NF4 weight in full, bit for bit as bitsandbytes does.

    .. math:: w_i = \mathrm{round}(c_{q_i} \cdot a_{\lfloor i / b \rfloor})

    with the codes :math:`c` and the absmax :math:`a` of blocks of :math:`b` in fp32.

    Args:
        weight: The weight; its absmax plain or double quantised.
        dtype: fp32, fp16 or bf16; ``weight.dtype`` if None.

    Returns:
        The weight, ``weight.shape``, contiguous; zeros for an all-zero block, NaN or infinity where
        an absmax is.

    Raises:
        ValueError: Another dtype, or a part of the weight is on another device.

    Source: Dettmers et al. 2023 (QLoRA), App. E; bitsandbytes 0.50, ``csrc/kernels.cu``.
    """
    dtype = dtype or weight.dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype}")
    check_devices(weight)
    nested = weight.nested
    result: Tensor = torch.ops.tli_engine.nf4_dequantize.default(
        weight.packed,
        weight.absmax,
        nested and nested.absmax,
        nested and nested.code,
        nested and nested.offset,
        list(weight.shape),
        dtype,
        weight.block_size,
        nested.block_size if nested else 256,
    )
    return result


def check_devices(weight: NF4Weight) -> None:
    """Raise ``ValueError`` unless all parts of a weight are on one device."""
    nested = weight.nested
    parts = {"absmax": weight.absmax}
    if nested:
        parts |= {"nested.absmax": nested.absmax, "nested.code": nested.code}
        parts |= {"nested.offset": nested.offset}
    for name, tensor in parts.items():
        if tensor.device != weight.packed.device:
            raise ValueError(
                f"weight.{name} must be on {weight.packed.device} as weight.packed, "
                f"got {tensor.device}"
            )
