"""Loss of many pooled pairs and its gradient, in chunks of rows: ``[N, N]`` is never held.

cuBLAS multiplies, in fp32. Between its products one kernel reads a chunk's cosines twice and turns
them into their gradient in place, which takes plain PyTorch a dozen passes and as many copies.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tli_engine.kernels.cosine_similarity import unit_rows
from tli_engine.kernels.segment_mean import segment_mean

# cosines of a chunk: 64 MiB
_CHUNK = 1 << 24


@triton.jit
def _load_row(
    cos_ptr, groups_ptr, offs, row, mine_0, mine_1, N, GROUPED: tl.constexpr
):  # fmt: skip
    """Some cosines of one row, and which of them are negatives."""
    keep = offs < N
    cos = tl.load(cos_ptr + offs, mask=keep, other=0.0)
    negative = keep & (offs != row)
    if GROUPED:
        negative &= tl.load(groups_ptr + offs, mask=keep, other=0) != mine_0
        negative &= tl.load(groups_ptr + N + offs, mask=keep, other=0) != mine_1
    return cos, negative


@triton.jit
def _candidates(cos, negative, positive, margin, SEMIHARD: tl.constexpr):
    if SEMIHARD:
        gap = positive - cos
        return negative & (gap > 0) & (gap < margin)
    return negative


@triton.jit(do_not_specialize=["N", "first"])
def _row_loss_kernel(
    cos_ptr,
    groups_ptr,
    loss_ptr,
    true_ptr,
    wrong_ptr,
    count_ptr,
    N,
    first,
    margin,
    inv_temperature,
    scale,
    BLOCK_N: tl.constexpr,
    INFONCE: tl.constexpr,
    SEMIHARD: tl.constexpr,
    GROUPED: tl.constexpr,
):
    row = first + tl.program_id(0)
    cos_ptr += tl.program_id(0).to(tl.int64) * N
    positive = tl.load(cos_ptr + row)
    mine_0, mine_1 = 0, 0
    if GROUPED:
        mine_0, mine_1 = tl.load(groups_ptr + row), tl.load(groups_ptr + N + row)
    lane = tl.arange(0, BLOCK_N)
    wrong = tl.zeros((BLOCK_N,), tl.float32)
    negatives = tl.zeros((BLOCK_N,), tl.float32)
    # of InfoNCE the largest logit and the sum of powers; of triplets the hardest, and its ties
    top = positive * inv_temperature if INFONCE else float("-inf")
    total = 0.0
    for start in tl.range(0, N, BLOCK_N):
        offs = start + lane
        cos, negative = _load_row(cos_ptr, groups_ptr, offs, row, mine_0, mine_1, N, GROUPED)
        wrong += tl.where(negative, cos, 0.0)
        negatives += tl.where(negative, 1.0, 0.0)
        chosen = negative | (offs == row)
        value = cos * inv_temperature
        if not INFONCE:
            chosen = _candidates(cos, negative, positive, margin, SEMIHARD)
            value = cos
        value = tl.where(chosen, value, float("-inf"))
        higher = tl.maximum(top, tl.max(value))
        if INFONCE:
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(value - higher))
        else:
            ties = tl.sum((chosen & (value == higher)).to(tl.float32))
            total = tl.where(top == higher, total, 0.0) + ties
        top = higher
    if INFONCE:
        loss = tl.log(total) + (top - positive * inv_temperature)
    else:
        loss = margin + top - positive
    # not a maximum, which would turn NaN into a loss of zero
    tl.store(loss_ptr + row, loss if INFONCE else tl.where(loss <= 0, 0.0, loss))
    tl.store(true_ptr + row, positive)
    tl.store(wrong_ptr + row, tl.sum(wrong))
    tl.store(count_ptr + row, tl.sum(negatives))
    # every thread has read the positive before one of them overwrites it
    tl.debug_barrier()
    for start in tl.range(0, N, BLOCK_N):
        offs = start + lane
        cos, negative = _load_row(cos_ptr, groups_ptr, offs, row, mine_0, mine_1, N, GROUPED)
        true = tl.where(offs == row, 1.0, 0.0)
        if INFONCE:
            share = tl.exp(cos * inv_temperature - top) / total
            dcos = tl.where(negative | (offs == row), share, 0.0) - true
            dcos *= inv_temperature
        else:
            tied = _candidates(cos, negative, positive, margin, SEMIHARD) & (cos == top)
            share = tl.where(tied, 1.0 / tl.maximum(total, 1.0), 0.0)
            dcos = tl.where(loss > 0, share - true, 0.0)
        tl.store(cos_ptr + offs, dcos * scale, mask=offs < N)


@triton.jit
def _tangent_rows_kernel(dunit_ptr, unit_ptr, norm_ptr, dx_ptr, D, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    dunit_ptr += row * D
    unit_ptr += row * D
    radial = tl.zeros((BLOCK_D,), tl.float32)
    for start in tl.range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        dunit = tl.load(dunit_ptr + offs_d, mask=offs_d < D, other=0.0)
        radial += dunit * tl.load(unit_ptr + offs_d, mask=offs_d < D, other=0.0)
    along = tl.sum(radial)
    norm = tl.load(norm_ptr + row)
    for start in tl.range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        dunit = tl.load(dunit_ptr + offs_d, mask=offs_d < D, other=0.0)
        unit = tl.load(unit_ptr + offs_d, mask=offs_d < D, other=0.0)
        tl.store(dx_ptr + row * D + offs_d, (dunit - along * unit) / norm, mask=offs_d < D)


def tangent_rows(dunit: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    """Return the gradient for rows, given that for the same rows scaled to length one."""
    dx = torch.empty_like(unit)
    block_d = min(4096, triton.next_power_of_2(unit.shape[1]))
    _tangent_rows_kernel[(len(unit),)](
        dunit, unit, norm, dx, unit.shape[1], BLOCK_D=block_d, num_warps=8
    )
    return dx


def pooled_alignment_loss_many(
    hidden: Tensor,
    weight: Tensor,
    offsets: Tensor,
    groups: Tensor | None,
    margin: float,
    inv_temperature: float,
    flags: dict[str, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch; the flags are the constants of the kernel for few pairs."""
    unit, norm = unit_rows(segment_mean(hidden, weight, offsets))
    dunit = torch.zeros_like(unit)
    sides, dsides = unit.chunk(2), dunit.chunk(2)
    N = len(sides[0])
    ways = 2 if flags["TWO_WAY"] else 1
    rows = unit.new_empty(ways, 4, N)
    step = max(1, min(N, _CHUNK // N))
    buffer = unit.new_empty(step, N)
    for way in range(ways):
        own, other = sides[way], sides[1 - way]
        for first in range(0, N, step):
            chunk = slice(first, min(first + step, N))
            cos = torch.mm(own[chunk], other.T, out=buffer[: chunk.stop - first])
            _row_loss_kernel[(len(cos),)](
                cos,
                offsets if groups is None else groups.contiguous(),
                *rows[way],
                N,
                first,
                margin,
                inv_temperature,
                1 / (ways * N),
                BLOCK_N=min(1024, triton.next_power_of_2(N)),
                **{name: flags[name] for name in ("INFONCE", "SEMIHARD", "GROUPED")},
                num_warps=4,
            )
            dsides[way][chunk].addmm_(cos, other)
            dsides[1 - way].addmm_(cos.T, own[chunk])
    losses, true, wrong, count = rows[:, 0], *rows[0, 1:]
    dpooled = tangent_rows(dunit, unit, norm)
    return losses.mean(), true.mean(), wrong.sum() / count.sum(), dpooled
