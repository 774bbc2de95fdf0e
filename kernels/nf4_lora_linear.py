"""``x @ W.T + s * (x @ A.T) @ B.T``: the update costs no pass over the output of its own.

Projections that share an input run as one: one ``x @ A.T``, ``B`` block-diagonal.

- Beside a fused product ``B`` is one more step of the tensor cores, in the same accumulators.
- Beside cuBLAS, where the output is by far the larger side, ``x @ A.T`` is appended to a copy of
  ``x``, and ``B`` to the weight: the contraction is 64 longer.
- Elsewhere the update is written first, and cuBLAS adds to it under its own arithmetic.
"""

import torch
from torch import Tensor

from tli_engine.kernels.keep_decoded import for_forward
from tli_engine.kernels.lora_down import is_narrow
from tli_engine.kernels.lora_products import down, group_slices, up
from tli_engine.kernels.nf4_dequantize import dequantize_tiles, dequantize_tiles_into
from tli_engine.kernels.nf4_dispatch import choose_tile
from tli_engine.kernels.nf4_linear import fused_forward
from tli_engine.kernels.widen import PAD, widen

# rows from which cuBLAS' time hides a copy of its input
_APPEND_FROM = 2048


def nf4_lora_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    sizes: list[int],
    scaling: float,
    dropout: float,
    block_size: int,
    tiled: bool,
    fast: bool,
) -> tuple[Tensor, Tensor]:
    """Launch what suits the shape; arguments are those of ``tli_engine::nf4_lora_linear``."""
    x = x.contiguous()
    M, K = x.shape
    N, rank = lora_B.shape
    if M == 0:
        return x.new_empty(0, N), x.new_empty(0, rank * len(sizes))
    s = down(x, lora_A, len(sizes), scaling, seed, dropout)
    narrow = is_narrow(x, len(sizes), rank)
    tile = choose_tile("fwd", x, M, N, K, block_size, absmax) if narrow else None
    if tile is not None:
        lora = (s, lora_B.contiguous(), sizes)
        return fused_forward(x, packed, absmax, bias, N, tiled, fast, tile, lora), s
    if narrow and tiled and pays_to_append(M, N, K):
        return _append(x, s, packed, absmax, bias, lora_B, sizes), s
    stored = (packed, absmax, N, K, x.dtype, block_size, tiled)
    weight = for_forward(packed, x.dtype, lambda: dequantize_tiles(*stored))
    return up(s, lora_B, bias, sizes).addmm_(x, weight.T), s


def pays_to_append(M: int, larger: int, smaller: int) -> bool:
    """Whether copying the smaller side is cheaper than passing over the larger one once more."""
    return M >= _APPEND_FROM and larger >= 2 * smaller


def _append(
    x: Tensor,
    s: Tensor,
    packed: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    lora_B: Tensor,
    sizes: list[int],
) -> Tensor:
    """``[x | s | 0] @ [W | B | 0].T``, ``B`` block-diagonal."""
    (N, rank), K = lora_B.shape, x.shape[1]
    weight = torch.empty(N, K + PAD, dtype=x.dtype, device=x.device)
    dequantize_tiles_into(weight[:, :K], packed, absmax)
    weight[:, K:].zero_()
    for group, rows in enumerate(group_slices(sizes)):
        first = K + group * rank
        weight[rows, first : first + rank].copy_(lora_B[rows])
    return torch.nn.functional.linear(widen(x, s), weight, bias)
