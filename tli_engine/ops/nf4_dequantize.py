"""``tli_engine::nf4_dequantize``: schema, shape rules and backends."""

from math import prod
from typing import Any

import torch
from torch import Tensor

from tli_engine import backends
from tli_engine.nf4 import BLOCK_SIZES, DTYPES, NF4Weight
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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # frozen, so the backward below is never called; unmarked, the result would require a gradient
    ctx.mark_non_differentiable(output)


torch.library.register_autograd(_OP, lambda *_: None, setup_context=_setup_context)


def nf4_dequantize(weight: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    r"""Return an NF4 weight in full, bit for bit as bitsandbytes does.

    .. math:: w_i = \mathrm{round}(c_{q_i} \cdot a_{\lfloor i / b \rfloor})

    with the codes :math:`c` and the absmax :math:`a` of blocks of :math:`b` in fp32. The weight is
    frozen: there is no gradient, neither of the codes nor of the absmax.

    Args:
        weight: The weight; its absmax plain or double quantised.
        dtype: fp32, fp16 or bf16; ``weight.dtype`` if None.

    Returns:
        The weight, ``weight.shape``, contiguous, requires no gradient; zeros for an all-zero block, NaN
        or infinity where an absmax is.

    Raises:
        ValueError: Another dtype, or a part of the weight does not fit the others, is on another
            device, or requires a gradient.

    Source: Dettmers et al. 2023 (QLoRA), App. E; bitsandbytes 0.50, ``csrc/kernels.cu``.
    """
    dtype = dtype or weight.dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype}")
    check_stored(weight)
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


def check_stored(weight: NF4Weight) -> None:
    """Raise ``ValueError`` unless the parts of a weight fit together; kernels trust their sizes."""
    if weight.block_size not in BLOCK_SIZES:
        raise ValueError(f"weight.block_size must be one of {BLOCK_SIZES}, got {weight.block_size}")
    nested, numel = weight.nested, prod(weight.shape)
    blocks = -(-numel // weight.block_size)
    absmax_dtype = torch.float32 if nested is None else torch.uint8
    parts = [
        ("packed", weight.packed, torch.uint8, (numel + 1) // 2),
        ("absmax", weight.absmax, absmax_dtype, blocks),
    ]
    if nested is not None:
        parts += [
            ("nested.absmax", nested.absmax, torch.float32, -(-blocks // nested.block_size)),
            ("nested.code", nested.code, torch.float32, 256),
            ("nested.offset", nested.offset, torch.float32, 1),
        ]
    for name, tensor, dtype, count in parts:
        _check_part(f"weight.{name}", tensor, dtype, count, weight.device)


def _check_part(
    name: str, tensor: Tensor, dtype: torch.dtype, count: int, device: torch.device
) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} as weight.packed, got {tensor.device}")
    if tensor.dtype != dtype or tensor.numel() != count or not tensor.is_contiguous():
        got = f"{tensor.dtype} {list(tensor.shape)}, strides {list(tensor.stride())}"
        raise ValueError(f"{name} must be {count} contiguous {dtype}, got {got}")
    if tensor.requires_grad:
        raise ValueError(f"{name} must not require a gradient, NF4 weights are frozen; detach it")
