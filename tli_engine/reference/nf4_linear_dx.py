"""The gradient of a product with an NF4 weight, in plain PyTorch."""

from torch import Tensor

from tli_engine.reference.nf4_linear import decoded


def nf4_linear_dx(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    K: int,
    block_size: int,
    tiled: bool,
    fast: bool,
) -> Tensor:
    """Return ``dy @ W``, the gradient of ``nf4_linear`` for ``x``."""
    return dy @ decoded(packed, absmax, dy.shape[1], K, block_size, tiled, dy.dtype)
