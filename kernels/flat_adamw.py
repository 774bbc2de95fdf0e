"""AdamW over one flat buffer, gradient clipping included, in one launch.

All programs are on the GPU at once. Each adds up the squares of its share of the gradient; after a
barrier each adds up all partial sums, in one order, and updates its share. Only the gradient is read
twice: the second time backwards, so that what was read last is still in the L2 cache. The numbers of
the tile that the update begins with are under way while the program waits at the barrier.
"""

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tli_engine.kernels.grid_barrier import PROGRAMS, arrive, wait_and_leave
from tli_engine.kernels.nf4_tile import round_to
from tli_engine.kernels.overlap import INTERPRET, follow, overlap
from tli_engine.kernels.semaphores import semaphores

# one 16-byte load of each buffer a thread; 64 registers, so that two launches fit on a GPU at once
BLOCK = 2048
WARPS = 16
# tiles of the gradient whose loads are under way at once while its norm is taken
UNROLL = 4
_MOST: int = PROGRAMS.value


@triton.jit
def _sum_of_squares(grad_ptr, first, last, P, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    acc = tl.zeros((UNROLL * BLOCK,), tl.float32)
    start, end = first.to(tl.int64) * BLOCK, tl.minimum(last.to(tl.int64) * BLOCK, P)
    for tile in tl.range(0, last - first, UNROLL):
        offs = start + tile * BLOCK + tl.arange(0, UNROLL * BLOCK)
        grad = tl.load(grad_ptr + offs, mask=offs < end, other=0.0, eviction_policy="evict_last")
        acc += grad * grad
    return tl.sum(acc)


@triton.jit
def _load_tile(
    parameter_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, tile, first, P, BLOCK: tl.constexpr
):
    """Numbers of a tile; of one before the program's first, none."""
    offs = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = (offs < P) & (tile >= first)
    parameter = tl.load(parameter_ptr + offs, mask=keep, other=0.0, eviction_policy="evict_first")
    grad = tl.load(grad_ptr + offs, mask=keep, other=0.0, eviction_policy="evict_first")
    exp_avg = tl.load(exp_avg_ptr + offs, mask=keep, other=0.0, eviction_policy="evict_first")
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offs, mask=keep, other=0.0, eviction_policy="evict_first")
    return parameter, grad, exp_avg, exp_avg_sq


@triton.jit
def _step_numbers(
    done, learning_rate, weight_decay, LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr
):
    """Factor of the decay, size of the step, and square root of the second correction, fp32."""
    # in fp64: 1 - beta2 alone loses four digits in fp32
    step = (done + 1).to(tl.float64)
    correction1 = 1.0 - tl.exp(step * tl.full((), LOG_BETA1, tl.float64))
    correction2 = 1.0 - tl.exp(step * tl.full((), LOG_BETA2, tl.float64))
    decay = 1.0 - learning_rate * weight_decay
    return decay, learning_rate / correction1.to(tl.float32), tl.sqrt_rn(correction2.to(tl.float32))


@triton.jit(do_not_specialize=["total_steps"])
def _flat_adamw_kernel(
    grad_ptr,
    schedule_ptr,
    parameter_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    shadow_ptr,
    state_ptr,
    part_ptr,
    counter_ptr,
    metrics_ptr,
    P,
    total_steps,
    eps,
    weight_decay,
    max_grad_norm,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_SHADOW: tl.constexpr,
    NORM: tl.constexpr,
    UPDATE: tl.constexpr,
    OVERLAP: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    follow(OVERLAP)
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    tiles = tl.cdiv(P, BLOCK)
    first, last = pid * tiles // programs, (pid + 1) * tiles // programs
    # before the barrier: the step is counted after it
    done = tl.load(state_ptr)
    if NORM:
        tl.store(part_ptr + pid, _sum_of_squares(grad_ptr, first, last, P, BLOCK, UNROLL))
        arrive(counter_ptr)
    if UPDATE:
        parameter, grad, exp_avg, exp_avg_sq = _load_tile(
            parameter_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, last - 1, first, P, BLOCK
        )
        learning_rate = tl.load(schedule_ptr + tl.minimum(done, total_steps - 1))
        decay, size, correction = _step_numbers(
            done, learning_rate, weight_decay, LOG_BETA1, LOG_BETA2
        )
        wait_and_leave(counter_ptr)
        offs_part = tl.arange(0, PARTS)
        parts = tl.load(
            part_ptr + offs_part, mask=offs_part < programs, other=0.0, cache_modifier=".cg"
        )
        norm = tl.sqrt_rn(tl.sum(parts))
        finite = norm < float("inf")
        if pid == programs - 1:
            # the last program: the interpreter runs it when all others have read the state
            tl.store(metrics_ptr, norm)
            tl.store(metrics_ptr + 1, learning_rate)
            tl.store(metrics_ptr + 2, tl.where(finite, 0.0, 1.0))
            skipped = tl.load(state_ptr + 1)
            tl.store(state_ptr, done + tl.where(finite, 1, 0))
            tl.store(state_ptr + 1, skipped + tl.where(finite, 0, 1))
        clip = tl.minimum(max_grad_norm / (norm + 1e-6), 1.0)
        # a step that is skipped has no tiles
        for turn in tl.range(tl.where(finite, last - first, 0)):
            tile = last - 1 - turn
            # its loads go before this tile's stores
            tile_ahead = _load_tile(
                parameter_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, tile - 1, first, P, BLOCK
            )
            offs = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            keep = offs < P
            grad *= clip
            exp_avg += (1.0 - BETA1) * (grad - exp_avg)
            exp_avg_sq = BETA2 * exp_avg_sq + (1.0 - BETA2) * grad * grad
            root = tl.sqrt_rn(exp_avg_sq) / correction + eps
            parameter = decay * parameter - size * (exp_avg / root)
            tl.store(parameter_ptr + offs, parameter, mask=keep)
            tl.store(exp_avg_ptr + offs, exp_avg, mask=keep)
            tl.store(exp_avg_sq_ptr + offs, exp_avg_sq, mask=keep)
            if HAS_SHADOW:
                shadow = round_to(parameter, shadow_ptr.dtype.element_ty, PORTABLE)
                tl.store(shadow_ptr + offs, shadow, mask=keep)
            parameter, grad, exp_avg, exp_avg_sq = tile_ahead


@cache
def _most_programs(device: torch.device) -> int:
    """One a multiprocessor; in the interpreter, a few."""
    if device.type != "cuda":
        return 5
    multiprocessors: int = torch.cuda.get_device_properties(device).multi_processor_count
    return min(multiprocessors, _MOST)


def _log(beta: float) -> float:
    # of zero, a number whose exponential is nothing beside 1
    return math.log(max(beta, 1e-300))


def flat_adamw(
    parameters: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    state: Tensor,
    schedule: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_grad_norm: float,
    shadow: Tensor | None = None,
) -> Tensor:
    """Launch the kernel; arguments are those of :func:`tli_engine.ops.flat_adamw.flat_adamw_`."""
    P, device = parameters.numel(), parameters.device
    programs = max(1, min(_most_programs(device), triton.cdiv(P, BLOCK)))
    metrics = torch.empty(3, dtype=torch.float32, device=device)
    arguments = (
        grad, schedule, parameters, exp_avg, exp_avg_sq, parameters if shadow is None else shadow,
        state, torch.empty(programs, dtype=torch.float32, device=device), semaphores(device, 1),
        metrics, P, schedule.numel(), eps, weight_decay, max_grad_norm,
    )  # fmt: skip
    # the interpreter runs one program after the other: none may wait for a later one
    for norm, update in ((True, False), (False, True)) if INTERPRET else ((True, True),):
        _flat_adamw_kernel[(programs,)](
            *arguments,
            BETA1=beta1,
            BETA2=beta2,
            LOG_BETA1=_log(beta1),
            LOG_BETA2=_log(beta2),
            BLOCK=BLOCK,
            UNROLL=UNROLL,
            PARTS=triton.next_power_of_2(programs),
            HAS_SHADOW=shadow is not None,
            NORM=norm,
            UPDATE=update,
            PORTABLE=INTERPRET,
            num_warps=WARPS,
            **overlap(device),
        )
    return metrics
