"""AdamW of a 16-bit tensor in one pass: gradient, statistics and master copy are read and written once."""

import math

import triton
import triton.language as tl
from torch import Tensor

from tli_engine.kernels.nf4_tile import round_to
from tli_engine.kernels.overlap import INTERPRET

BLOCK = 1024
WARPS = 4


@triton.jit
def _at_random(x, random):
    """Round fp32 to bf16, up or down with the probability of its distance."""
    # bf16 is the upper half: a carry out of the lower one rounds up
    bits = x.to(tl.int32, bitcast=True) + (random & 0xFFFF).to(tl.int32)
    rounded = (bits & -65536).to(tl.float32, bitcast=True)
    # NaN may be all ones, and a carry would make it -0
    return tl.where(x == x, rounded, x).to(tl.bfloat16)


@triton.jit(do_not_specialize=["decay", "size", "correction", "eps"])
def _mixed_adamw_kernel(
    parameter_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    master_ptr,
    seed_ptr,
    P,
    decay,
    size,
    correction,
    eps,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = offs < P
    grad = tl.load(grad_ptr + offs, mask=keep, other=0.0).to(tl.float32)
    exp_avg = tl.load(exp_avg_ptr + offs, mask=keep, other=0.0).to(tl.float32)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offs, mask=keep, other=0.0).to(tl.float32)
    if HAS_MASTER:
        value = tl.load(master_ptr + offs, mask=keep, other=0.0)
    else:
        value = tl.load(parameter_ptr + offs, mask=keep, other=0.0).to(tl.float32)
    exp_avg += (1.0 - BETA1) * (grad - exp_avg)
    exp_avg_sq = BETA2 * exp_avg_sq + (1.0 - BETA2) * grad * grad
    value = decay * value - size * (exp_avg / (tl.sqrt_rn(exp_avg_sq) / correction + eps))
    if HAS_MASTER:
        dtype: tl.constexpr = parameter_ptr.dtype.element_ty
        tl.store(master_ptr + offs, value, mask=keep)
        tl.store(exp_avg_ptr + offs, exp_avg, mask=keep)
        tl.store(exp_avg_sq_ptr + offs, exp_avg_sq, mask=keep)
        tl.store(parameter_ptr + offs, round_to(value, dtype, PORTABLE), mask=keep)
    else:
        low, high = (offs & 0xFFFFFFFF).to(tl.uint32), (offs >> 32).to(tl.uint32)
        zero = tl.zeros((BLOCK,), tl.uint32)
        one, two, three, _ = tl.philox(tl.load(seed_ptr), low, high, zero, zero)
        tl.store(parameter_ptr + offs, _at_random(value, one), mask=keep)
        tl.store(exp_avg_ptr + offs, _at_random(exp_avg, two), mask=keep)
        tl.store(exp_avg_sq_ptr + offs, _at_random(exp_avg_sq, three), mask=keep)


def mixed_adamw(
    parameter: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    master: Tensor | None,
    seed: Tensor | None,
    step: int,
    rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Launch the kernel; arguments are those of :func:`tli_engine.ops.mixed_adamw.mixed_adamw_`."""
    P = parameter.numel()
    if P == 0:
        return
    _mixed_adamw_kernel[(triton.cdiv(P, BLOCK),)](
        parameter,
        grad.contiguous(),
        exp_avg,
        exp_avg_sq,
        parameter if master is None else master,
        parameter if seed is None else seed,
        P,
        1 - rate * weight_decay,
        rate / (1 - beta1**step),
        math.sqrt(1 - beta2**step),
        eps,
        BETA1=beta1,
        BETA2=beta2,
        BLOCK=BLOCK,
        HAS_MASTER=master is not None,
        PORTABLE=INTERPRET,
        num_warps=WARPS,
    )
