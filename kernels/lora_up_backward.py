"""Gradients of LoRA's way up, ``s @ B.T``: for ``s`` and for ``B``, from one pass over ``dy``.

With few rows both products of a tile of ``dy`` are made while it is there. Each program owns a range
of rows of ``B``; the last one adds the parts of the gradient of ``s``, in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tli_engine.kernels.lora_down import width
from tli_engine.kernels.nf4_tile import dot, round_to
from tli_engine.kernels.overlap import INTERPRET, follow, overlap
from tli_engine.kernels.split_sum import arrivals, split_for, sum_of_parts

# rows of dy and columns of s whose product one program's registers hold
_MAX_SUMS = 4096
# steps of a program that take as long as adding up another level of parts
_MANY_STEPS = 2


@triton.jit(do_not_specialize=["M"])
def _lora_up_backward_kernel(
    dy_ptr,
    lora_b_ptr,
    s_ptr,
    t_ptr,
    db_ptr,
    part_ptr,
    lock_ptr,
    M,
    N,
    group_1,
    group_2,
    scaling,
    R: tl.constexpr,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    NEEDS_DB: tl.constexpr,
    OVERLAP: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    follow(OVERLAP)
    part = tl.program_id(0)
    steps = tl.cdiv(N, BLOCK_N)
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    row = tl.arange(0, BLOCK_M)[:, None]
    rank = tl.arange(0, WIDTH)[None, :]
    keep_s = (row < M) & (rank < RANKS)
    s = tl.load(s_ptr + row * RANKS + rank, mask=keep_s, other=0.0)
    acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    for step in tl.range(part * steps // SPLIT, (part + 1) * steps // SPLIT):
        offs_n = step * BLOCK_N + tl.arange(0, BLOCK_N)
        keep_dy = (row < M) & (offs_n < N)[None, :]
        offs_dy = row.to(tl.int64) * N + offs_n[None, :]
        dy = tl.load(dy_ptr + offs_dy, mask=keep_dy, other=0.0)
        group = (offs_n >= group_1).to(tl.int32) + (offs_n >= group_2).to(tl.int32)
        own = rank - R * group[:, None]
        keep_b = (offs_n < N)[:, None] & (own >= 0) & (own < R)
        offs_b = offs_n.to(tl.int64)[:, None] * R + own
        b = tl.load(lora_b_ptr + offs_b, mask=keep_b, other=0.0).to(tl.float32)
        acc = dot(dy, round_to(b * scaling, dtype, PORTABLE), acc, PORTABLE)
        if NEEDS_DB:
            none = tl.zeros((BLOCK_N, WIDTH), tl.float32)
            db = dot(tl.trans(dy), s, none, PORTABLE)
            tl.store(db_ptr + offs_b, round_to(db, db_ptr.dtype.element_ty, PORTABLE), mask=keep_b)
    offs = row * RANKS + rank
    total, is_last = sum_of_parts(acc, part_ptr, lock_ptr, part, offs, keep_s, M * RANKS, SPLIT)
    tl.store(t_ptr + offs, round_to(total, dtype, PORTABLE), mask=keep_s & is_last)


def group_ends(sizes: list[int]) -> tuple[int, int]:
    """First rows of the second and of the third group; the number of rows where there is none."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return ends[0], ends[1] if len(ends) > 1 else ends[-1]


def is_short(M: int, ranks: int) -> bool:
    """Whether one program takes all rows, and the kernel therefore the whole."""
    return M <= 256 and max(16, triton.next_power_of_2(M)) * width(ranks) <= _MAX_SUMS


def lora_up_backward(
    dy: Tensor, lora_B: Tensor, s: Tensor, sizes: list[int], scaling: float, needs_db: bool
) -> tuple[Tensor, Tensor]:
    """Return ``scaling * dy @ B``, ``[M, ranks]``, and ``dy.T @ s``, ``[N, r]``; few rows.

    Args:
        dy: ``[M, N]``, contiguous, 16 bits.
        lora_B: ``[N, r]``; block-diagonal over the groups.
        s: ``[M, ranks]`` in ``dy``'s dtype.
        sizes: Rows of each group.
        scaling: Factor of ``B`` before it is rounded to ``dy``'s dtype.
        needs_db: Whether ``B`` needs its gradient; it is empty if not.
    """
    (M, N), rank, ranks = dy.shape, lora_B.shape[1], s.shape[1]
    t = torch.empty_like(s)
    db = lora_B.new_empty((N, rank) if needs_db else (0,))
    block_n = 64
    split = split_for(1, triton.cdiv(N, block_n), _MANY_STEPS)
    _lora_up_backward_kernel[(split,)](
        dy,
        lora_B.contiguous(),
        s,
        t,
        db,
        torch.empty(split, M, ranks, dtype=torch.float32, device=dy.device),
        arrivals(dy.device, 1),
        M,
        N,
        *group_ends(sizes),
        scaling,
        R=rank,
        RANKS=ranks,
        WIDTH=width(ranks),
        BLOCK_M=max(16, triton.next_power_of_2(M)),
        BLOCK_N=block_n,
        SPLIT=split,
        NEEDS_DB=needs_db,
        PORTABLE=INTERPRET,
        # 4 would spill
        num_warps=8 if M * width(ranks) > 512 else 4,
        **overlap(dy.device),
    )
    return t, db
