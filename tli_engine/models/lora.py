"""A linear layer with a low-rank update."""

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from tli_engine.nn import NF4Linear


class LoRALinear(nn.Module):
    r"""A frozen linear layer and its low-rank update, :math:`y = Wx + s\,BA\,x`.

    Source: Hu et al. 2021, eq. 3; scaling :math:`s = \alpha / r`, or :math:`\alpha / \sqrt r` for
    rsLoRA (Kalajdzievski 2023). Module and parameter names are PEFT's.

    A and B are fp32 beside 16-bit weights. On a dense layer the update is computed in fp32, as by
    PEFT. On an NF4 layer it rides along in one op, in ``x``'s dtype: A, B and what lies between are
    rounded to it, so that in 16 bits output and gradients are PEFT's but for these roundings: a
    relative error (of the norm) under the dtype's eps, 4e-3 in bf16 and 4e-4 in fp16 where it was
    measured (CPU, K = 128). There the update is added before the output is rounded, so that a small
    one counts; beside a dense layer, and in PEFT, it is rounded off. In fp32 they are PEFT's up to the order of
    sums, 1e-6. Dropout there is a mask of one seed a call, drawn from torch's generator of ``x``'s
    device.
    """

    def __init__(
        self, base_layer: nn.Linear | NF4Linear, r: int, alpha: float, rslora: bool, dropout: float
    ) -> None:
        super().__init__()
        # not an NF4 layer's weight, which undoes the kernels' layout
        held = base_layer if isinstance(base_layer, NF4Linear) else base_layer.weight
        # adapters are trained in fp32 beside bf16 weights, as PEFT does
        dtype, device = torch.promote_types(held.dtype, torch.float32), held.device
        self.base_layer = base_layer
        # nn.Linear's own values would be thrown away, and draw from the caller's random numbers
        options = {"bias": False, "device": device, "dtype": dtype}
        self.lora_A: nn.Linear = skip_init(nn.Linear, base_layer.in_features, r, **options)  # type: ignore[no-untyped-call]
        self.lora_B: nn.Linear = skip_init(nn.Linear, r, base_layer.out_features, **options)  # type: ignore[no-untyped-call]
        self.dropout = nn.Dropout(dropout)
        self.r, self.alpha, self.rslora = r, alpha, rslora
        self.scaling = alpha / math.sqrt(r) if rslora else alpha / r
        self.active = True

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted projection of ``x``, ``[…, K]`` to ``[…, N]``, in ``x``'s dtype."""
        if self.active and isinstance(self.base_layer, NF4Linear):
            return self._forward_nf4(self.base_layer, x)
        y: Tensor = self.base_layer(x)
        if not self.active:
            return y
        update = self.lora_B(self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype))))
        adapted: Tensor = y + update * self.scaling
        return adapted.to(y.dtype)

    def _forward_nf4(self, base_layer: NF4Linear, x: Tensor) -> Tensor:
        dropout, seed = self.dropout.p if self.dropout.training else 0.0, None
        if dropout > 0:
            # drawn on the device, which no one waits for; set by torch.manual_seed
            seed = torch.randint(2**63 - 1, (), device=x.device)
        A, B = self.lora_A.weight, self.lora_B.weight
        return base_layer.lora_forward(x, A, B, self.scaling, dropout=dropout, seed=seed)
