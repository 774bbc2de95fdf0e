"""``x @ W.T + s * (x @ A.T) @ B.T``, rounded once: the update enters the product's fp32 sums.

Projections that share an input run as one: one ``x @ A.T``, ``B`` block-diagonal.

- Beside a fused product ``B`` is one more step of the tensor cores, in the same accumulators.
- Beside cuBLAS, where the input is not over twice as wide as the output, ``x @ A.T`` is appended to a
  copy of ``x``, and ``B`` to the weight: the contraction is 64 longer.
- Elsewhere cuBLAS writes its sums in fp32, and a kernel adds the update to them.
"""

from functools import partial

from torch import Tensor

from tli_engine.kernels.keep_decoded import for_forward
from tli_engine.kernels.lora_down import is_narrow
from tli_engine.kernels.lora_products import adapted, down
from tli_engine.kernels.nf4_dequantize import dequantize_tiles, dequantize_tiles_into
from tli_engine.kernels.nf4_dispatch import choose_tile
from tli_engine.kernels.nf4_linear import fused_forward
from tli_engine.kernels.widen import appended, appends_gradient, pays_to_append


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
    # sums in fp32 are written and read: twice the output's bytes
    if narrow and tiled and pays_to_append(M, K, 2 * N):
        adapter = (s, lora_B, bias, sizes)
        return appended(x, *adapter, packed, lambda w: dequantize_tiles_into(w, packed, absmax)), s
    decode = partial(dequantize_tiles, packed, absmax, N, K, x.dtype, block_size, tiled)
    # of no use on a way back that decodes into a larger weight
    useless = narrow and tiled and appends_gradient(M, N, K, seed)
    weight = decode() if useless else for_forward(packed, x.dtype, decode)
    return adapted(x, weight, s, lora_B, bias, sizes), s
