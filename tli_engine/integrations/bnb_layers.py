"""``Linear4bit`` on the engine's kernels: the same parameters, another forward.

A layer becomes one of these by its ``__class__``, and stops being one the same way. The name is
bitsandbytes' own, since code finds layers by it.
"""

from contextlib import suppress
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module
from torch import Tensor

from tli_engine.integrations.frozen_weight import FrozenWeight, NotReplacedError
from tli_engine.layouts import Adapter
from tli_engine.ops.nf4_linear import check_input

_FROZEN = "_tli_engine_weight"


class Linear4bit(bnb.nn.Linear4bit):  # type: ignore[misc]
    """bitsandbytes' layer, its product computed by the engine."""

    compute_type_is_set: bool

    def forward(self, x: Tensor) -> Tensor:
        """Return the projection of ``x``, ``[…, K]`` to ``[…, N]``, in ``x``'s dtype."""
        y = self.product(self.to_compute_type(x))
        return y.to(x.dtype)

    def to_compute_type(self, x: Tensor) -> Tensor:
        """Cast ``x`` as bitsandbytes does before the product."""
        if not self.compute_type_is_set:
            self.set_compute_type(x)
            self.compute_type_is_set = True
        return x if self.compute_dtype is None else x.to(self.compute_dtype)

    def product(self, x: Tensor, adapter: Adapter | None = None) -> Tensor:
        """Return ``x``'s projection, ``[…, K]`` to ``[…, N]``, in its dtype, with the adapter's update.

        Raises:
            ValueError: ``x`` has other columns, or lies on another device than the weight.
            NotReplacedError: The weight was exchanged for one that no kernel reads.
        """
        stored = self.frozen_weight().stored
        check_input(x, stored.N, stored.K, stored.device)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        rows = x.reshape(-1, stored.K)
        if adapter is None:
            y = stored.product(rows, bias, False)
        else:
            y = stored.adapted(rows, bias, adapter, False)
        return y.view(*x.shape[:-1], stored.N)

    def frozen_weight(self) -> FrozenWeight:
        """The weight as the kernels take it; read anew if the parameter is another than before."""
        frozen: FrozenWeight | None = getattr(self, _FROZEN, None)
        # a compiled graph sees what replaces the parameter (__setattr__, _apply), not what writes into it
        if frozen is not None and (torch.compiler.is_compiling() or frozen.is_of(self.weight)):
            return frozen
        fix_4bit_weight_quant_state_from_module(self)
        frozen = FrozenWeight(self.weight)
        setattr(self, _FROZEN, frozen)
        return frozen

    def read_weight_anew(self) -> None:
        """Lay the parameter out again; one that no kernel reads is an error at the next call."""
        self.__dict__.pop(_FROZEN, None)
        with suppress(NotReplacedError):
            setattr(self, _FROZEN, FrozenWeight(self.weight))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "weight":
            # at once: what was compiled is to find it there
            self.read_weight_anew()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != _FROZEN}

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._apply(*args, **kwargs)
        self.read_weight_anew()
        return result

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.read_weight_anew()
