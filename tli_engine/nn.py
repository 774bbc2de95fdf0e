"""Modules over the ops: linear layers whose frozen weight is NF4."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from tli_engine.nf4 import DTYPES, NF4Weight
from tli_engine.ops.counter_dropout import counter_dropout
from tli_engine.ops.nf4_dequantize import check_stored
from tli_engine.ops.nf4_linear import Numerics, check_input, tile, untile
from tli_engine.ops.nf4_lora_linear import check_lora

Residency = Literal["nf4", "bf16", "auto"]


class NF4Linear(nn.Module):
    """A frozen linear layer with its weight in NF4, decoded on the fly, forward and backward.

    On a GPU the bytes are laid out for the kernels, losslessly, and a double quantised absmax is
    decoded to fp32 once: 0.06 bytes a weight instead of 0.016. :attr:`weight` gives bitsandbytes' bytes.

    The weight stays where it was built: ``.to(device)`` moves the bias alone, and the next call says so.

    Attributes:
        bias: ``[N]`` in the model's dtype, cast to the input's, or ``None``.
        numerics: ``exact`` multiplies by bitsandbytes' values bit for bit; ``fast`` may round twice.
        weight_residency: ``nf4`` keeps no other copy. ``bf16`` keeps the weight in the input's
            dtype from the first call on: 2 bytes more a weight, and cuBLAS alone for any number of
            rows. ``auto`` does so while a quarter of the GPU's memory stays free.

    Raises:
        ValueError: An option is not as above, or the weight's parts, or its bias, do not fit.
    """

    bias: Tensor | None

    def __init__(
        self,
        weight: NF4Weight,
        bias: Tensor | None = None,
        *,
        numerics: Numerics = "exact",
        weight_residency: Residency = "nf4",
    ) -> None:
        super().__init__()
        if len(weight.shape) != 2:
            raise ValueError(f"weight must be [N, K], got {list(weight.shape)}")
        if numerics not in ("exact", "fast"):
            raise ValueError(f"numerics must be exact or fast, got {numerics!r}")
        if weight_residency not in ("nf4", "bf16", "auto"):
            raise ValueError(
                f"weight_residency must be nf4, bf16 or auto, got {weight_residency!r}"
            )
        check_stored(weight)
        if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
            got = f"{bias.dtype} {list(bias.shape)}"
            raise ValueError(f"bias must be floating point [{weight.shape[0]}], got {got}")
        self.out_features, self.in_features = weight.shape
        self.numerics, self.weight_residency = numerics, weight_residency
        self._source = weight
        self._packed, self._absmax = weight.packed, weight.absmax_fp32()
        self._tiled = _is_tileable(weight)
        if self._tiled:
            self._packed, self._absmax = tile(self._packed, self._absmax, *weight.shape)
            # the only copy of the bytes is the tiled one; of the statistics, what it lacks
            absmax = self._absmax if weight.nested is None else weight.absmax
            self._source = replace(weight, packed=self._packed, absmax=absmax)
        self._dense: Tensor | None = None
        self.register_buffer("bias", bias)

    @property
    def weight(self) -> NF4Weight:
        """The weight, bitsandbytes' own bytes; a copy where they are laid out for the kernels."""
        if not self._tiled:
            return self._source
        packed, absmax = untile(self._packed, self._absmax, self.out_features, self.in_features)
        if self._source.nested is not None:
            absmax = self._source.absmax
        return replace(self._source, packed=packed, absmax=absmax)

    @property
    def dtype(self) -> torch.dtype:
        """What the weight was quantised from."""
        return self._source.dtype

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self._packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of the weight as it is held, a resident copy included."""
        decoded = self._absmax.nbytes if self._source.nested is not None else 0
        return self._source.nbytes + decoded + (0 if self._dense is None else self._dense.nbytes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the projection of ``x``, ``[…, K]`` to ``[…, N]``, in ``x``'s dtype."""
        self._check(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        dense = self._resident(x)
        if dense is not None:
            return nn.functional.linear(x, dense, bias)
        y: Tensor = torch.ops.tli_engine.nf4_linear.default(
            x.reshape(-1, self.in_features),
            self._packed,
            self._absmax,
            bias,
            self.out_features,
            self._source.block_size,
            self._tiled,
            self.numerics == "fast",
        )
        return y.view(*x.shape[:-1], self.out_features)

    def lora_forward(
        self,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        *,
        dropout: float = 0.0,
        seed: Tensor | None = None,
    ) -> Tensor:
        """Return the adapted projection; arguments as :func:`tli_engine.ops.nf4_lora_linear`.

        Beside a resident weight, the update is added to cuBLAS' result, with the same dropout.
        """
        self._check(x)
        check_lora(x, lora_A, lora_B, self.out_features, [self.out_features], dropout, seed)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        used = seed if dropout > 0 else None
        rows, dense = x.reshape(-1, self.in_features), self._resident(x)
        if dense is not None:
            dropped = rows if used is None else counter_dropout(rows, used, dropout)
            s = dropped @ (lora_A * scaling).to(x.dtype).T
            base = nn.functional.linear(rows, dense, bias)
            y = torch.addmm(base, s, lora_B.to(x.dtype).T)
        else:
            y = torch.ops.tli_engine.nf4_lora_linear.default(
                rows,
                self._packed,
                self._absmax,
                bias,
                lora_A,
                lora_B,
                used,
                [self.out_features],
                scaling,
                dropout,
                self._source.block_size,
                self._tiled,
                self.numerics == "fast",
            )[0]
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        options = f"numerics={self.numerics}, weight_residency={self.weight_residency}"
        return f"{sizes}, {options}, nbytes={self.nbytes}"

    def _check(self, x: Tensor) -> None:
        check_input(x, self.out_features, self.in_features, self.device)
        if self.bias is not None and self.bias.device != self.device:
            raise ValueError(
                f"bias must be on {self.device} as the weight, got {self.bias.device}; to move a "
                f"layer, build it anew of weight.to(device)"
            )

    def _resident(self, x: Tensor) -> Tensor | None:
        """The weight in ``x``'s dtype, if it is to be kept."""
        if self.weight_residency == "nf4":
            return None
        if self._dense is not None and self._dense.dtype == x.dtype:
            return self._dense
        if self.weight_residency == "auto" and not self._fits(x):
            # decided once: a layer must not change its arithmetic half-way through a run
            self.weight_residency = "nf4"
            return None
        # fp64 holds the fp32 values
        dtype = x.dtype if x.dtype in DTYPES else torch.float32
        # kept for training too, if the first call is one of inference
        with torch.inference_mode(False):
            self._dense = self.weight.dequantize(dtype).to(x.dtype)
        return self._dense

    def _fits(self, x: Tensor) -> bool:
        if not x.is_cuda:
            return False
        free, total = torch.cuda.mem_get_info(x.device)
        unused = torch.cuda.memory_reserved(x.device) - torch.cuda.memory_allocated(x.device)
        needed = self.out_features * self.in_features * x.element_size()
        return free + unused - needed > total // 4


def _is_tileable(weight: NF4Weight) -> bool:
    return weight.device.type == "cuda" and weight.block_size == 64 and weight.shape[1] % 128 == 0
