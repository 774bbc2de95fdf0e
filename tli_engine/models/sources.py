"""Where a model's tensors lie: safetensors shards or a GGUF file, read one tensor at a time."""

import json
import struct
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tli_engine.errors import UserError
from tli_engine.nf4 import NF4Weight
from tli_engine.nf4_checkpoint import from_state_dict


class TensorSource(Protocol):
    """Tensors by their transformers name within the decoder, e.g. ``layers.0.mlp.up_proj.weight``.

    ``lm_head.weight``, which lies beside the decoder, goes by that name.
    """

    def __contains__(self, name: str) -> bool: ...

    def read(self, name: str) -> Tensor:
        """Read one tensor, in its stored dtype, or fp32 where it is stored quantised."""
        ...

    def read_rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Read some rows of a matrix, and no others."""
        ...

    def read_nf4(self, name: str) -> NF4Weight | None:
        """Read a weight that bitsandbytes has stored in NF4; ``None`` if it is stored otherwise."""
        ...


# how checkpoints of causal, bare and multimodal models spell the decoder
_PREFIXES = ("model.", "", "language_model.model.", "model.language_model.")
HEAD = "lm_head.weight"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# others are codes of some quantisation, which must not pass for numbers
_PLAIN = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def decoder_prefix(name: str, tensors: Container[str]) -> str:
    """What stands before the decoder's names among a checkpoint's ``tensors``.

    Raises:
        UserError: There is no decoder.
    """
    prefix = next((p for p in _PREFIXES if f"{p}embed_tokens.weight" in tensors), None)
    if prefix is None:
        raise UserError(f"{name}: no embed_tokens.weight in its safetensors files")
    return prefix


class SafetensorsSource:
    """Safetensors files, with ``model.safetensors.index.json`` if there are several.

    Args:
        name: What messages call the model.
        fetch: Returns the local path of a file of the model, or ``None`` if it has none of that
            name; a model on the Hub downloads it then.
    """

    def __init__(self, name: str, fetch: Callable[[str], Path | None]) -> None:
        self._name = name
        self._fetch = fetch
        self._open: dict[str, Any] = {}
        self._shard_of = self._index()
        self._prefix = decoder_prefix(name, self._shard_of)

    def _index(self) -> dict[str, str]:
        index = self._fetch(INDEX)
        if index is not None:
            try:
                weight_map: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
                return dict(weight_map.items())
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                raise UserError(f"{index}: not a safetensors index: {e!r}") from None
        if self._fetch(SINGLE) is None:
            raise UserError(
                f"{self._name}: has neither {SINGLE} nor {INDEX}; pickled weights (*.bin) are "
                f"never read, convert them with transformers' save_pretrained"
            )
        return dict.fromkeys(self._shard(SINGLE).keys(), SINGLE)

    def _stored_name(self, name: str) -> str:
        if name == HEAD:
            return self._prefix.removesuffix("model.") + HEAD
        return self._prefix + name

    def _shard(self, file: str) -> Any:
        if file not in self._open:
            path = self._fetch(file)
            if path is None:
                raise UserError(f"{self._name}: {file} is missing; download this shard")
            try:
                self._open[file] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as e:
                raise UserError(
                    f"{path}: not a whole safetensors file ({e}); download it again"
                ) from None
        return self._open[file]

    def __contains__(self, name: str) -> bool:
        return self._stored_name(name) in self._shard_of

    def _get(self, stored: str, rows: Sequence[int] | None = None) -> Tensor:
        file = self._shard_of[stored]
        shard = self._shard(file)
        try:
            if rows is None:
                tensor: Tensor = shard.get_tensor(stored)
                return tensor
            part = shard.get_slice(stored)
            return torch.cat([part[row : row + 1] for row in rows])
        except SafetensorError as e:
            raise UserError(
                f"{self._name}: {file} has no readable {stored}, where its index puts it: {e}"
            ) from None

    def _plain(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.dtype not in _PLAIN:
            raise UserError(
                f"{self._name}: {name} is stored as {tensor.dtype}; only full-precision and "
                f"bitsandbytes NF4 weights are read"
            )
        return tensor

    def read(self, name: str) -> Tensor:
        """Read one tensor; see :class:`TensorSource`."""
        nf4 = self.read_nf4(name)
        if nf4 is not None:
            return nf4.dequantize()
        return self._plain(name, self._get(self._stored_name(name)))

    def read_rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Read some rows; see :class:`TensorSource`."""
        return self._plain(name, self._get(self._stored_name(name), rows))

    def read_nf4(self, name: str) -> NF4Weight | None:
        """Read an NF4 weight; see :class:`TensorSource`."""
        stored = self._stored_name(name)
        parts = [n for n in self._shard_of if n.startswith(f"{stored}.")]
        if not parts:
            return None
        return from_state_dict({n: self._get(n) for n in (stored, *parts)}, stored)


# ggml stores the rotary halves of q and k interleaved for these architectures
_INTERLEAVED = ("llama", "mistral")


class GgufSource:
    """A GGUF file; tensors are dequantised to fp32 as they are read."""

    def __init__(self, path: Path, config: Any) -> None:
        import gguf

        self._path = path
        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, OSError, IndexError, struct.error) as e:
            raise UserError(f"{path}: not a whole GGUF file: {e}") from None
        architecture = reader.fields["general.architecture"].contents()
        by_name = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        if architecture not in by_name:
            raise UserError(f"{path}: unknown GGUF architecture {architecture!r}")
        self._names = gguf.get_tensor_name_map(by_name[architecture], config.num_hidden_layers)
        self._tensors = {t.name: t for t in reader.tensors}
        self._interleaved = architecture in _INTERLEAVED
        self._norm_offset = 1.0 if architecture.startswith("gemma") else 0.0
        self._config = config

    def _stored_name(self, name: str) -> str | None:
        full = name if name == HEAD else f"model.{name}"
        stored: str | None = self._names.get_name(full, (".weight", ".bias"))
        return stored

    def __contains__(self, name: str) -> bool:
        return self._stored_name(name) in self._tensors

    def decoder_names(self) -> list[str]:
        """Names of all tensors of the decoder, in transformers' spelling."""
        from transformers import AutoModel

        with torch.device("meta"):
            decoder = AutoModel.from_config(self._config)
        return [name for name, _ in decoder.named_parameters() if name in self]

    def read(self, name: str) -> Tensor:
        """Read one tensor; see :class:`TensorSource`."""
        stored = self._tensors[self._stored_name(name) or ""]
        values = _dequantize(stored.data, stored.tensor_type)
        if self._interleaved and ".q_proj." in name:
            values = _rotary_halves(values, self._config.num_attention_heads)
        if self._interleaved and ".k_proj." in name:
            values = _rotary_halves(values, self._config.num_key_value_heads)
        if self._norm_offset and name.endswith("norm.weight"):
            values = values - self._norm_offset
        return values

    def read_rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Read some rows; see :class:`TensorSource`."""
        stored = self._tensors[self._stored_name(name) or ""]
        return _dequantize(stored.data[list(rows)], stored.tensor_type)

    def read_nf4(self, name: str) -> NF4Weight | None:
        """GGUF has no NF4."""
        return None


def _dequantize(data: Any, kind: Any) -> Tensor:
    from gguf import quants

    return torch.from_numpy(quants.dequantize(data, kind).copy()).float()


def _rotary_halves(weight: Tensor, heads: int) -> Tensor:
    """Undo ggml's interleaving: ``[heads, pairs, 2, …]`` to ``[heads, 2, pairs, …]``."""
    pairs = weight.shape[0] // heads // 2
    return weight.view(heads, pairs, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
