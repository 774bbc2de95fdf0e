"""The CUDA C++ product for Hopper (``csrc/``) behind the op on records, with its adapter's narrow products.

An adapter's update is one more step of the tensor cores in the same launch. Where measurements say
so, many rows go to cuBLAS, which reads the weight decoded into a buffer.
"""

from functools import partial

import torch
from torch import Tensor

from tli_engine.kernels.keep_decoded import for_backward, for_forward
from tli_engine.kernels.lora_down import is_narrow
from tli_engine.kernels.lora_products import adapted, down, down_dx, up
from tli_engine.kernels.nf4_records import dequantize_records, dequantize_records_into
from tli_engine.kernels.nf4_sm90_dispatch import MAX_GROUPS, MAX_RANKS, choose_tile, launch
from tli_engine.kernels.widen import (
    appended,
    appended_gradient,
    appends_gradient,
    pays_to_append,
)

# rows up to which decoding and cuBLAS takes twice as long as the fused product, or more: 8B shape, H200
_FUSED_ROWS = 128


def rides_along(ranks: int, sizes: list[int]) -> bool:
    """Whether the product takes this adapter into its own launch."""
    whole_blocks = all(size % 64 == 0 for size in sizes)
    return ranks <= MAX_RANKS and ranks % 8 == 0 and len(sizes) <= MAX_GROUPS and whole_blocks


def nf4_linear_records(
    x: Tensor,
    records: Tensor,
    transposed: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    seed: Tensor | None,
    sizes: list[int],
    scaling: float,
    dropout: float,
    N: int,
    fast: bool,
) -> tuple[Tensor, Tensor]:
    """Launch; arguments are those of ``tli_engine::nf4_linear_records``."""
    x = x.contiguous()
    M = x.shape[0]
    if M == 0:
        return x.new_empty(0, N), x.new_empty(0, 0 if lora_A is None else lora_A.shape[0])
    if lora_A is None or lora_B is None:
        return product(x, records, N, fast, bias), x.new_empty(M, 0)
    s = down(x, lora_A, len(sizes), scaling, seed, dropout)
    return product(x, records, N, fast, bias, (s, lora_B, sizes, seed)), s


def product(
    x: Tensor,
    records: Tensor,
    N: int,
    fast: bool,
    bias: Tensor | None,
    lora: tuple[Tensor, Tensor, list[int], Tensor | None] | None = None,
) -> Tensor:
    """Return x W^T + bias, ``[M, N]``, and with ``lora`` s B^T too.

    Rounded once, but for few rows and an adapter that does not ride along, which is added to what is
    rounded: decoding the weight for cuBLAS would take two to four times as long.

    ``lora`` is s ``[M, groups r]`` as :func:`down` gives it, B ``[N, r]``, the groups' sizes of N, and
    the dropout's seed.
    """
    (M, K), dense = x.shape, x.dtype == torch.float32
    tile = None if dense else choose_tile("fwd", M, N, K, fast, x.device)
    if tile is not None and lora is None:
        return launch(x, records, N, False, fast, tile, bias)
    if lora is None:
        weight = for_forward(records, x.dtype, lambda: dequantize_records(records, N, K, x.dtype))
        return torch.nn.functional.linear(x, weight, bias)
    s, lora_B, sizes, seed = lora
    if tile is not None and rides_along(s.shape[1], sizes):
        operand = adapter_operand(lora_B, x.dtype)
        return launch(x, records, N, False, fast, tile, bias, (s, operand, sizes))
    if tile is not None and M <= _FUSED_ROWS:
        return launch(x, records, N, False, fast, tile, bias).add_(up(s, lora_B, sizes))
    if is_narrow(x, len(sizes), lora_B.shape[1]) and pays_to_append(M, K, 2 * N):
        adapter = (s, lora_B, bias, sizes)
        return appended(x, *adapter, records, lambda w: dequantize_records_into(w, records))
    decode = partial(dequantize_records, records, N, K, x.dtype)
    narrow = is_narrow(x, len(sizes), lora_B.shape[1])
    # of no use on a way back that decodes into a larger weight
    useless = narrow and appends_gradient(M, N, K, seed)
    weight = decode() if useless else for_forward(records, x.dtype, decode)
    return adapted(x, weight, s, lora_B, bias, sizes)


def adapter_operand(lora: Tensor, dtype: torch.dtype) -> Tensor:
    """An adapter's weight as the product reads it: fp32, or in the input's dtype."""
    return lora.contiguous() if lora.dtype in (torch.float32, dtype) else lora.to(dtype)


def product_dx(
    dy: Tensor,
    records: Tensor,
    transposed: Tensor | None,
    K: int,
    fast: bool,
    lora: tuple[Tensor, Tensor, Tensor | None, float] | None,
) -> Tensor:
    """Return ``dy @ W``, and ``D(t @ A)`` on top for ``lora``: ``(t, A, seed, dropout)``."""
    M, N = dy.shape
    dense = dy.dtype == torch.float32
    tile = None if dense else choose_tile("dx", M, K, N, fast, dy.device)
    if transposed is not None and tile is not None:
        if lora is None:
            return launch(dy, transposed, K, True, fast, tile)
        t, lora_A, seed, _ = lora
        # with dropout the update has a mask of its own and cannot share the product's sums
        if seed is None and rides_along(t.shape[1], []):
            operand = adapter_operand(lora_A, dy.dtype)
            return launch(dy, transposed, K, True, fast, tile, lora=(t, operand, [K]))
        return down_dx(*lora, launch(dy, transposed, K, True, fast, tile))
    decode = partial(dequantize_records, records, N, K, dy.dtype)
    if lora is None:
        return dy @ for_backward(records, dy.dtype, decode)
    t, lora_A, seed, _ = lora
    if is_narrow(dy, 1, t.shape[1]) and appends_gradient(M, N, K, seed):
        return appended_gradient(dy, t, lora_A, lambda w: dequantize_records_into(w, records))
    return down_dx(*lora).addmm_(dy, for_backward(records, dy.dtype, decode))
