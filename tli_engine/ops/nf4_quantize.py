"""``tli_engine::nf4_quantize``: schema, shape rules and backends."""

from typing import Any

import torch
from torch import Tensor

from tli_engine import backends, nf4
from tli_engine.nf4 import NF4Weight
from tli_engine.reference.nf4_quantize import nf4_quantize as _reference

_OP = "tli_engine::nf4_quantize"

torch.library.define(_OP, "(Tensor weight, int block_size) -> (Tensor, Tensor)")


@torch.library.register_fake(_OP)
def _fake(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    numel = weight.numel()
    packed = weight.new_empty((numel + 1) // 2, 1, dtype=torch.uint8)
    blocks = (numel + block_size - 1) // block_size
    return packed, weight.new_empty(blocks, dtype=torch.float32)


torch.library.impl(_OP, "CPU")(_reference)


@torch.library.impl(_OP, "CUDA")
def _cuda(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    return backends.resolve("nf4_quantize")(weight, block_size)  # type: ignore[no-any-return]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    # codes are steps, and the absmax alone is not the weight: the backward below is never called
    ctx.mark_non_differentiable(*output)


torch.library.register_autograd(_OP, lambda *_: None, setup_context=_setup_context)


def nf4_quantize(weight: Tensor, *, block_size: int = 64, double_quant: bool = False) -> NF4Weight:
    r"""Quantise a weight to NF4, with the bits of :func:`tli_engine.nf4.quantize`.

    .. math:: q_i = \arg\min_j |c_j - w_i / a|, \qquad a = \max_i |w_i| \text{ over a block}

    There is no gradient: a weight that requires one is read as it is, and detached.

    Args:
        weight: Weight of any shape but ``[]`` and not empty; fp32, fp16 or bf16.
        block_size: Elements that share an absmax: a power of two from 32 to 4096.
        double_quant: Whether to store absmax in 8 bits.

    Returns:
        The quantised weight, on ``weight``'s device, none of it requires a gradient; an all-zero
        block has code 7.

    Raises:
        ValueError: An argument is not as above, or the weight holds NaN or infinity.

    Source: Dettmers et al. 2023 (QLoRA), App. E; bitsandbytes 0.50, ``csrc/kernels.cu``.
    """
    nf4.check_weight(weight, block_size)
    packed, absmax = torch.ops.tli_engine.nf4_quantize.default(weight.detach(), block_size)
    if not absmax.isfinite().all():
        flat = weight.detach().reshape(-1)
        raise ValueError(nf4.name_non_finite(flat, absmax, weight.shape, block_size))
    nested = None
    if double_quant:
        absmax, nested = nf4.nest_absmax(absmax)
    return NF4Weight(packed, absmax, tuple(weight.shape), weight.dtype, block_size, nested)
