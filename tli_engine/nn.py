"""Modules over the ops: linear layers whose frozen weight is NF4."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tli_engine.layouts import Adapter, PortableWeight, RecordedWeight, RowsOf, lay_out
from tli_engine.layouts import run_again as run_again
from tli_engine.nf4 import DTYPES, NF4Weight
from tli_engine.ops.autocast import cast_input
from tli_engine.ops.dense_lora_linear import dense_lora_linear
from tli_engine.ops.nf4_dequantize import check_stored
from tli_engine.ops.nf4_linear import Numerics, check_input
from tli_engine.ops.nf4_lora_linear import check_lora

Residency = Literal["nf4", "bf16", "auto"]
# a step of the 8B shape, H200: of 64 rows 0.66 ms in NF4 and 0.77 in bf16, of 256 1.56 and 1.06
_RESIDENT_ROWS = 256


class NF4Linear(nn.Module):
    """A frozen linear layer with its weight in NF4, decoded on the fly, forward and backward.

    On a GPU the bytes are laid out for the kernels, losslessly, and a double quantised absmax is
    decoded to fp32 once: 0.06 bytes a weight instead of 0.016. :attr:`weight` gives bitsandbytes' bytes.
    Where the CUDA extension runs, the way back is as fast as the way there with a transposed copy,
    see :meth:`add_transposed_copy`; else the weight is decoded in full for it.

    The weight stays where it was built: ``.to(device)`` moves the bias alone, and the next call says so.

    Attributes:
        dtype: What the weight was quantised from.
        bias: ``[N]`` in the model's dtype, cast to the input's, or ``None``.
        numerics: ``exact`` multiplies by bitsandbytes' values bit for bit; ``fast`` may round twice.
        weight_residency: ``nf4`` keeps no other copy. ``bf16`` keeps the weight in the input's
            dtype from the first call on: 2 bytes more a weight, and cuBLAS alone for any number of
            rows. ``auto`` does so for 256 rows or more, from the first call of so many on, while a
            quarter of the GPU's memory stays free; for fewer the kernels on NF4 are faster.

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
        if not isinstance(weight, NF4Weight):
            raise TypeError(
                f"weight must be an NF4Weight (nf4.quantize), got {type(weight).__name__}"
            )
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
        self.dtype = weight.dtype
        self._stored: PortableWeight | RecordedWeight | RowsOf = lay_out(weight)
        self._dense: Tensor | None = None
        self.register_buffer("bias", bias)

    @property
    def weight(self) -> NF4Weight:
        """The weight, bitsandbytes' own bytes; a copy where they are laid out for the kernels."""
        return self._stored.weight()

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self._stored.device

    @property
    def nbytes(self) -> int:
        """Bytes of the weight as it is held, a transposed and a resident copy included."""
        return self._stored.nbytes + (0 if self._dense is None else self._dense.nbytes)

    @property
    def transposed_nbytes(self) -> int:
        """Bytes of the transposed copy; 0 without."""
        return self._stored.transposed_nbytes

    def add_transposed_copy(self) -> None:
        """Hold the weight a second time, in NF4, for the gradient of the input.

        For a layer whose input needs one, on a GPU where the CUDA extension runs; elsewhere the
        kernels read one copy in both directions, and this does nothing.
        """
        self._stored.add_transposed_copy()

    def forward(self, x: Tensor) -> Tensor:
        """Return the projection of ``x``, ``[…, K]`` to ``[…, N]``, in ``x``'s dtype.

        Under autocast ``x`` is cast first, as by ``nn.Linear``.
        """
        x = cast_input(x)
        self._check(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        dense = self._resident(x)
        if dense is not None:
            return nn.functional.linear(x, dense, bias)
        rows = x.reshape(-1, self.in_features)
        y = self._stored.product(rows, bias, self.numerics == "fast")
        return y.view(*x.shape[:-1], self.out_features)

    def lora_forward(
        self,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        *,
        sizes: Sequence[int] | None = None,
        dropout: float = 0.0,
        seed: Tensor | None = None,
    ) -> Tensor:
        """Return the adapted projection; arguments as :func:`tli_engine.ops.nf4_lora_linear`.

        Beside a resident weight, the update is added to cuBLAS' sums, with the same dropout.
        """
        x = cast_input(x)
        self._check(x)
        groups = [self.out_features] if sizes is None else list(sizes)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        used = seed if dropout > 0 else None
        rows, dense = x.reshape(-1, self.in_features), self._resident(x)
        if dense is None:
            check_lora(x, lora_A, lora_B, self.out_features, groups, dropout, seed)
            adapter = Adapter(lora_A, lora_B, used, groups, scaling, dropout)
            y = self._stored.adapted(rows, bias, adapter, self.numerics == "fast")
        else:
            update = (lora_A, lora_B, scaling)
            options: dict[str, Any] = {"sizes": groups, "dropout": dropout, "seed": used}
            y = dense_lora_linear(rows, dense, *update, bias, **options)
        return y.view(*x.shape[:-1], self.out_features)

    def share_rows(self, joined: "NF4Linear", first: int) -> None:
        """Take the weight from the rows of ``joined`` from ``first`` on, which hold the same values."""
        if not isinstance(joined._stored, RowsOf):
            self._stored = RowsOf(joined._stored, first, self.weight)
        # the joined layer has a resident copy of its own
        self._dense = None

    def stored_tensors(self) -> list[Tensor]:
        """The weight as the kernels read it: contiguous, of any dtypes; none where it lies elsewhere."""
        return self._stored.tensors()

    def set_stored_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Read the weight from other tensors, of :meth:`stored_tensors`' bytes, dtypes and shapes."""
        self._stored.set_tensors(tensors)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        options = f"numerics={self.numerics}, weight_residency={self.weight_residency}"
        nbytes = f"nbytes={self.nbytes}, transposed_nbytes={self.transposed_nbytes}"
        return f"{sizes}, {options}, {nbytes}"

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
        is_auto = self.weight_residency == "auto"
        if is_auto and x.numel() < _RESIDENT_ROWS * self.in_features:
            return None
        if self._dense is not None and self._dense.dtype == x.dtype:
            return self._dense
        if is_auto and not self._fits(x):
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
