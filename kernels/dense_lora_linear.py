"""A dense product by cuBLAS, in fp32 sums, to which LoRA's update is added before they are rounded."""

from torch import Tensor

from tli_engine.kernels.lora_products import adapted, down


def dense_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    seed: Tensor | None,
    sizes: list[int],
    scaling: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Launch; arguments are those of ``tli_engine::dense_lora_linear``."""
    x = x.contiguous()
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0]), x.new_empty(0, lora_A.shape[0])
    s = down(x, lora_A, len(sizes), scaling, seed, dropout)
    return adapted(x, weight, s, lora_B, bias, sizes), s
