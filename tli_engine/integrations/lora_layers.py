"""PEFT's LoRA over dense layers, without its round trip through the adapter's dtype.

PEFT's own forward runs, over an accelerated base, wherever there is more to it than one plain
adapter without dropout: several active at once, DoRA and other variants, a bias in the adapter,
adapters by row, merged ones; hooks, a ``forward`` of its own or another class on the base or on a
part of the adapter; hooks of all modules.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from torch import Tensor, nn

from tli_engine.integrations.model_parts import has_global_hooks, is_transformed
from tli_engine.nf4 import DTYPES
from tli_engine.ops import dense_lora_linear

_PLAIN = (Tensor, nn.Parameter)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# torch's own; None where another was put there before
_LINEAR_FORWARD = (
    nn.Linear.forward
    if getattr(nn.Linear.forward, "__globals__", {}).get("__name__") == nn.Linear.__module__
    else None
)


class Update(NamedTuple):
    """One plain adapter: ``lora_A`` ``[r, K]``, ``lora_B`` ``[N, r]``, of one dtype and device."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float


class Linear(lora.Linear):  # type: ignore[misc]
    """PEFT's layer over a dense one."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the adapted projection of ``x``, ``[…, K]`` to ``[…, N]``, in ``x``'s dtype."""
        base = self.base_layer
        if not args and not kwargs and type(base) is nn.Linear and _takes(x, base.weight):
            update = plain_update(self)
            plain = not is_hooked(base) and not torch.is_autocast_enabled(x.device.type)
            if update and plain and not is_transformed():
                return dense_lora_linear(x, base.weight, *update, base.bias)
        out: Tensor = super().forward(x, *args, **kwargs)
        return out


def _takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the op has kernels for such an input and weight: PEFT's own forward takes any."""
    # a distributed tensor is of another class
    plain = type(x) in _PLAIN and type(weight) in _PLAIN and x.dtype == weight.dtype
    known = x.dtype in DTYPES or (x.dtype == torch.float64 and x.device.type == "cpu")
    return plain and known and x.device == weight.device and x.device.type in ("cpu", "cuda")


def is_hooked(base: nn.Module) -> bool:
    """Whether calling ``base`` does more than its class's forward, which a fused product would skip."""
    if "forward" in base.__dict__ or any(getattr(base, name) for name in _HOOKS):
        return True
    # another one may stand in the class that all projections share
    return type(base) is nn.Linear and nn.Linear.forward is not _LINEAR_FORWARD


def plain_update(layer: Any) -> Update | None:
    """What the layer adds to its base, if that is one product of two factors; else ``None``."""
    if layer.disable_adapters or layer.merged:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or not _is_plain(layer, active[0]):
        return None
    (name,) = active
    A, B = layer.lora_A[name], layer.lora_B[name]
    return Update(A.weight, B.weight, layer.scaling[name])


def _is_plain(layer: Any, name: str) -> bool:
    dropout = layer.lora_dropout[name]
    if is_hooked(dropout) or has_global_hooks() or not _passes(dropout):
        return False
    dora: Mapping[str, bool] = getattr(layer, "use_dora", {})
    variant = name in getattr(layer, "lora_variant", {}) or dora.get(name, False)
    if variant or getattr(layer, "fan_in_fan_out", False):
        return False
    factors = (layer.lora_A[name], layer.lora_B[name])
    if not all(type(f) is nn.Linear and f.bias is None and not is_hooked(f) for f in factors):
        return False
    return len({(factor.weight.dtype, factor.weight.device) for factor in factors}) == 1


def _passes(dropout: nn.Module) -> bool:
    """Whether it gives what it gets; of other classes than PEFT puts there nothing is known."""
    if type(dropout) is nn.Identity:
        return True
    return type(dropout) is nn.Dropout and not (dropout.training and dropout.p > 0)
