"""Reads a model's tensors one at a time, checked, in the form in which they will be held."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tli_engine import nf4
from tli_engine.config import Numerics, Quantize, Residency
from tli_engine.errors import UserError
from tli_engine.models.files import ModelFiles
from tli_engine.nn import NF4Linear


@dataclass(frozen=True)
class TensorReader:
    """Reads tensors of ``files`` to ``device``; the options are :func:`~tli_engine.models.early.load_early`'s."""

    files: ModelFiles
    dtype: torch.dtype
    device: torch.device
    quantize: Quantize
    double_quant: bool
    numerics: Numerics
    weight_residency: Residency

    def parameter(
        self, name: str, expected: Tensor, rows: Sequence[int] | None = None
    ) -> nn.Parameter:
        """Read a tensor, or some rows of it, as a frozen parameter."""
        self._check_there(name)
        source = self.files.source
        tensor = source.read(name) if rows is None else source.read_rows(name, rows)
        self._check(name, tensor, [len(rows), *expected.shape[1:]] if rows else expected.shape)
        return nn.Parameter(tensor.to(self.device, self.dtype), requires_grad=False)

    def nf4_linear(self, path: str, linear: nn.Linear) -> NF4Linear | None:
        """Read a linear layer into NF4, if it is to be held so; else ``None``."""
        name = f"{path}.weight"
        self._check_there(name)
        stored = None if self.quantize == "none" else self.files.source.read_nf4(name)
        if stored is None and self.quantize != "nf4":
            return None
        if stored is None:
            tensor = self.files.source.read(name)
            self._check(name, tensor, linear.weight.shape)
            held = tensor.to(self.device, self.dtype)
            stored = nf4.quantize(held, double_quant=self.double_quant)
        elif stored.shape != tuple(linear.weight.shape):
            raise self._wrong_shape(name, stored.shape, linear.weight.shape)
        bias = None if linear.bias is None else self.parameter(f"{path}.bias", linear.bias)
        return NF4Linear(
            stored.to(self.device),
            bias,
            numerics=self.numerics,
            weight_residency=self.weight_residency,
        )

    def _check_there(self, name: str) -> None:
        if name not in self.files.source:
            raise UserError(f"{self.files.name}: has no tensor {name}; is the download complete?")

    def _check(self, name: str, tensor: Tensor, expected: Sequence[int]) -> None:
        if list(tensor.shape) != list(expected):
            raise self._wrong_shape(name, tensor.shape, expected)
        if not torch.isfinite(tensor).all():
            raise UserError(f"{self.files.name}: {name} holds NaN or inf; the weights are damaged")

    def _wrong_shape(self, name: str, shape: Sequence[int], expected: Sequence[int]) -> UserError:
        return UserError(
            f"{self.files.name}: {name} is {list(shape)}, its config says {list(expected)}"
        )
