"""``[x | s | 0] @ [W | B | 0].T``: a narrow product that goes along through a matmul's contraction."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from tli_engine.kernels.keep_decoded import for_forward
from tli_engine.kernels.lora_products import group_slices

# columns more: a stage of cuBLAS' contraction
PAD = 64
# rows from which cuBLAS' time hides a copy of its input
_APPEND_FROM = 2048


@triton.jit(do_not_specialize=["M"])
def _widen_kernel(
    x_ptr,
    narrow_ptr,
    wide_ptr,
    M,
    K,
    RANKS: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row, keep_m = offs_m.to(tl.int64)[:, None], (offs_m < M)[:, None]
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    keep = keep_m & (offs_k < K)
    x = tl.load(x_ptr + row * K + offs_k, mask=keep, other=0.0)
    tl.store(wide_ptr + row * (K + PAD) + offs_k, x, mask=keep)
    if tl.program_id(1) == 0:
        rank = tl.arange(0, PAD)[None, :]
        narrow = tl.load(narrow_ptr + row * RANKS + rank, mask=keep_m & (rank < RANKS), other=0.0)
        tl.store(wide_ptr + row * (K + PAD) + K + rank, narrow, mask=keep_m)


def widen(x: Tensor, narrow: Tensor) -> Tensor:
    """Return ``[M, K + PAD]`` in one pass; ``x`` and ``narrow`` contiguous, of one dtype."""
    M, K = x.shape
    wide = torch.empty(M, K + PAD, dtype=x.dtype, device=x.device)
    block_m, block_k = 4, 1024
    _widen_kernel[(triton.cdiv(M, block_m), triton.cdiv(K, block_k))](
        x,
        narrow,
        wide,
        M,
        K,
        RANKS=narrow.shape[1],
        PAD=PAD,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        num_warps=4,
    )
    return wide


def pays_to_append(M: int, copied: int, passed: int) -> bool:
    """Whether copying so many columns of ``M`` rows costs less than passing over so many once more."""
    return M >= _APPEND_FROM and copied < passed


def appends_gradient(M: int, N: int, K: int, seed: Tensor | None) -> bool:
    """Whether ``t @ A`` is appended to ``dy @ W``, ``[M, K]``, whose weight is then no forward's.

    Not with dropout: the update has a mask of its own and cannot share the product's contraction.
    """
    return seed is None and pays_to_append(M, 2 * N, K)


def appended_gradient(
    dy: Tensor, t: Tensor, lora_A: Tensor, decode_into: Callable[[Tensor], None]
) -> Tensor:
    """Return ``dy @ W + t @ A``, rounded once: ``[dy | t | 0] @ [W; A; 0]``; ``decode_into`` writes ``W``."""
    N, (ranks, K) = dy.shape[1], lora_A.shape
    weight = torch.empty(N + PAD, K, dtype=dy.dtype, device=dy.device)
    decode_into(weight[:N])
    weight[N : N + ranks].copy_(lora_A)
    weight[N + ranks :].zero_()
    return widen(dy, t) @ weight


def appended(
    x: Tensor,
    s: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    sizes: list[int],
    stored: Tensor,
    decode_into: Callable[[Tensor], None],
) -> Tensor:
    """Return ``x @ W.T + s @ B.T + bias``, rounded once: ``[x | s | 0] @ [W | B | 0].T``.

    ``decode_into`` writes ``W`` from what is ``stored``; it is kept for the way back, if a block is
    run again.
    """
    wide = _weight_beside(lora_B, sizes, x.shape[1], x.dtype, decode_into)
    for_forward(stored, x.dtype, lambda: wide[:, : x.shape[1]])
    return torch.nn.functional.linear(widen(x, s), wide, bias)


def _weight_beside(
    lora_B: Tensor, sizes: list[int], K: int, dtype: torch.dtype, fill: Callable[[Tensor], None]
) -> Tensor:
    """Return ``[W | B | 0]``, ``[N, K + PAD]``, ``B`` block-diagonal; ``fill`` writes ``W``."""
    N, rank = lora_B.shape
    wide = torch.empty(N, K + PAD, dtype=dtype, device=lora_B.device)
    fill(wide[:, :K])
    wide[:, K:].zero_()
    for group, rows in enumerate(group_slices(sizes)):
        first = K + group * rank
        wide[rows, first : first + rank].copy_(lora_B[rows])
    return wide
