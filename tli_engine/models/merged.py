"""Models made of a base model and an adapter, or of trained weights, written one tensor at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tli_engine import nf4
from tli_engine.errors import UserError
from tli_engine.models.files import ModelFiles
from tli_engine.models.model_folder import (
    SHARD_BYTES,
    Written,
    check_tensor,
    is_stored_in_nf4,
    layout_of,
    write_folder,
)
from tli_engine.models.peft_format import StoredAdapter
from tli_engine.models.whole_folder import whole_folder
from tli_engine.nf4 import NF4Weight
from tli_engine.nf4_checkpoint import nf4_state_dict

_WEIGHT = ".weight"


class MergedSource:
    r"""A model's tensors with an adapter merged in: :math:`W + s\,BA` in fp32, rounded to W's dtype.

    What is stored quantised is merged from its dequantised values: of NF4 into the dtype that the
    weight was quantised from, of GGUF into fp32. A :class:`TensorSource`.

    Args:
        files: The base model.
        adapter: None leaves the tensors as they are.
        strength: Scales what the adapter adds.

    Raises:
        UserError: The adapter adapts what the model does not have.
    """

    def __init__(
        self, files: ModelFiles, adapter: StoredAdapter | None = None, strength: float = 1.0
    ) -> None:
        self._name, self._base = files.name, files.source
        self._scaling = strength * adapter.scaling if adapter else 0.0
        self._updates = adapter.tensors if adapter else {}
        for layer in self._updates:
            if f"{layer}{_WEIGHT}" not in self._base:
                raise UserError(f"the adapter adapts {layer}, which {files.name} does not have")

    def __contains__(self, name: str) -> bool:
        return name in self._base

    def read(self, name: str) -> Tensor:
        """Read one tensor, merged.

        Raises:
            UserError: The base model does not have it, or the adapter does not fit it.
        """
        if name not in self._base:
            raise UserError(f"{self._name}: has no tensor {name}; is the download complete?")
        update = self._updates.get(name.removesuffix(_WEIGHT))
        if update is None:
            return self._base.read(name)
        stored = self._base.read_nf4(name)
        weight = self._base.read(name) if stored is None else stored.dequantize(torch.float32)
        dtype = weight.dtype if stored is None else stored.dtype
        wide = torch.promote_types(weight.dtype, torch.float32)
        a, b = (half.to(wide) for half in update)
        if (b.shape[0], a.shape[1]) != tuple(weight.shape) or b.shape[1] != a.shape[0]:
            shapes = [list(a.shape), list(b.shape)]
            raise UserError(
                f"{name} of {self._name} is {list(weight.shape)}, and the adapter's lora_A and "
                f"lora_B are {shapes}; is it the right base model?"
            )
        return torch.addmm(weight.to(wide), b, a, alpha=self._scaling).to(dtype)

    def read_rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Read some rows of a matrix; of an adapted one, all are read."""
        if name.removesuffix(_WEIGHT) in self._updates:
            return self.read(name)[list(rows)]
        return self._base.read_rows(name, rows)

    def read_nf4(self, name: str) -> NF4Weight | None:
        """Read a weight that lies there in NF4 and has no adapter."""
        return None if name.removesuffix(_WEIGHT) in self._updates else self._base.read_nf4(name)

    def base_nf4(self, name: str) -> NF4Weight | None:
        """Read a weight that lies there in NF4, without what an adapter adds."""
        return self._base.read_nf4(name)


def write_model(
    files: ModelFiles,
    tensors: Callable[[str], Tensor] | Mapping[str, Tensor],
    out: Path,
    dtype: torch.dtype | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> Written:
    """Write a whole model that transformers loads, in the place of an earlier one.

    Args:
        files: The model that configuration and tokenizer are taken from.
        tensors: The weights by name, e.g. ``layers.0.mlp.up_proj.weight``, and ``lm_head.weight``
            where it is not tied; on any device. They are asked for one at a time.
        out: Made, whole or not at all; an earlier one of that name is replaced.
        dtype: What the weights are rounded to; None leaves theirs.
        shard_bytes: A file of weights takes no more; so much is held in memory.

    Raises:
        UserError: A weight of a wrong shape or with NaN or infinity, or the folder cannot be written.
        KeyError: A weight is not among ``tensors``.
    """
    with whole_folder(out) as part:
        return write_dense(files, tensors, part, dtype, shard_bytes=shard_bytes)


def write_dense(
    files: ModelFiles,
    tensors: Callable[[str], Tensor] | Mapping[str, Tensor],
    folder: Path,
    dtype: torch.dtype | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
    advance: Callable[[int], None] = lambda weights: None,
) -> Written:
    """:func:`write_model` into a folder that is there and empty; what fails leaves its part there."""
    layout = layout_of(files.config)
    read = tensors.__getitem__ if isinstance(tensors, Mapping) else tensors

    def weights() -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name, shape in layout.shapes.items():
            tensor = read(name).detach()
            tensor = tensor.to(dtype or tensor.dtype)
            check_tensor(files, name, tensor, shape)
            yield name, {name: tensor}
            advance(1)

    return write_folder(files, layout, weights(), folder, shard_bytes=shard_bytes)


def write_nf4(
    files: ModelFiles,
    source: MergedSource,
    folder: Path,
    *,
    double_quant: bool = False,
    device: torch.device | None = None,
    shard_bytes: int = SHARD_BYTES,
    advance: Callable[[int], None] = lambda weights: None,
) -> Written:
    """Write a model as a bitsandbytes NF4 checkpoint; what fails leaves its part there.

    The blocks' linear layers are quantised, in blocks of 64. Of a base model that is in NF4 itself,
    the same layers are, each as it was: those without an adapter keep their bytes.

    Args:
        files: The base model.
        source: What is written of it.
        folder: Is there, and empty.
        double_quant: Store the absmax in 8 bits; not for what is in NF4 already.
        device: Where weights are quantised; the bytes are the same anywhere.
        shard_bytes: As for :func:`write_model`.
        advance: Called with the number of weights done.

    Raises:
        UserError: As :func:`write_model`.
    """
    layout, like_base = layout_of(files.config), is_stored_in_nf4(files)

    def weights() -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name, shape in layout.shapes.items():
            quantised = source.read_nf4(name)
            if quantised is None:
                tensor = source.read(name)
                check_tensor(files, name, tensor, shape)
                before = source.base_nf4(name)
                if name in layout.linears and (before is not None or not like_base):
                    quantised = _quantise(tensor, before, double_quant, device)
            if quantised is None:
                yield name, {name: tensor}
            else:
                yield name, nf4_state_dict(quantised, name)
            advance(1)

    return write_folder(files, layout, weights(), folder, nf4=True, shard_bytes=shard_bytes)


def _quantise(
    tensor: Tensor, before: NF4Weight | None, double_quant: bool, device: torch.device | None
) -> NF4Weight:
    if tensor.dtype not in nf4.DTYPES:
        tensor = tensor.float()
    block_size = 64 if before is None else before.block_size
    nested = double_quant if before is None else before.nested is not None
    moved = tensor.to(device or tensor.device)
    return nf4.quantize(moved, block_size=block_size, double_quant=nested).to("cpu")
