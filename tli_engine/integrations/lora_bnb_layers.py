"""PEFT's LoRA over 4-bit layers: base and update in one launch, where they are one sum."""

from typing import Any

import torch
from peft.tuners.lora import bnb as peft_bnb
from torch import Tensor

from tli_engine.integrations import bnb_layers
from tli_engine.integrations.lora_layers import is_hooked, plain_update
from tli_engine.layouts import Adapter


class Linear4bit(peft_bnb.Linear4bit):  # type: ignore[misc]
    """PEFT's layer over a 4-bit one."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the adapted projection of ``x``, ``[…, K]`` to ``[…, N]``, in ``x``'s dtype."""
        base = self.base_layer
        if not args and not kwargs and isinstance(base, bnb_layers.Linear4bit):
            update = plain_update(self)
            if update and not is_hooked(base) and not torch.is_autocast_enabled(x.device.type):
                cast = base.to_compute_type(x)
                if cast.dtype == x.dtype:
                    A, B, scaling = update
                    return base.product(x, Adapter(A, B, None, [B.shape[0]], scaling, 0.0))
        y: Tensor = super().forward(x, *args, **kwargs)
        return y
