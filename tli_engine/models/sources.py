"""Where a model's tensors lie: safetensors shards or a GGUF file, read one tensor at a time."""

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tli_engine.errors import UserError


class TensorSource(Protocol):
    """Tensors by their transformers name within the decoder, e.g. ``layers.0.mlp.up_proj.weight``."""

    def __contains__(self, name: str) -> bool: ...

    def read(self, name: str) -> Tensor:
        """Read one tensor, in its stored dtype, or fp32 where it is stored quantised."""
        ...


# how checkpoints of causal, bare and multimodal models spell the decoder
_PREFIXES = ("model.", "", "language_model.model.", "model.language_model.")


class SafetensorsSource:
    """A folder of safetensors files, with ``model.safetensors.index.json`` if there are several."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shard_of = self._index()
        self._open: dict[Path, Any] = {}
        prefixes = [p for p in _PREFIXES if f"{p}embed_tokens.weight" in self._shard_of]
        if not prefixes:
            raise UserError(f"{folder}: no embed_tokens.weight in its safetensors files")
        self._prefix = prefixes[0]

    def _index(self) -> dict[str, Path]:
        index = self._folder / "model.safetensors.index.json"
        single = self._folder / "model.safetensors"
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                return {name: self._folder / shard for name, shard in weight_map.items()}
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as e:
                raise UserError(f"{index}: not a safetensors index: {e!r}") from None
        if single.is_file():
            with _open_shard(single) as shard:
                return dict.fromkeys(shard.keys(), single)
        if any(self._folder.glob("pytorch_model*.bin")):
            raise UserError(
                f"{self._folder}: only pickled weights (*.bin), which are never read; convert them "
                f"with transformers' save_pretrained"
            )
        raise UserError(f"{self._folder}: no model.safetensors and no model.safetensors.index.json")

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._shard_of

    def read(self, name: str) -> Tensor:
        """Read one tensor; see :class:`TensorSource`."""
        path = self._shard_of[self._prefix + name]
        if path not in self._open:
            self._open[path] = _open_shard(path)
        try:
            tensor: Tensor = self._open[path].get_tensor(self._prefix + name)
        except SafetensorError as e:
            raise UserError(f"{path}: {self._prefix + name}: cannot be read: {e}") from None
        return tensor


def _open_shard(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; download this shard") from None
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: not a whole safetensors file ({e}); download it again") from None


# ggml stores the rotary halves of q and k interleaved for these architectures
_INTERLEAVED = ("llama", "mistral")


class GgufSource:
    """A GGUF file; tensors are dequantised to fp32 as they are read."""

    def __init__(self, path: Path, config: Any) -> None:
        import gguf

        self._path = path
        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, OSError) as e:
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
        stored: str | None = self._names.get_name(f"model.{name}", (".weight", ".bias"))
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
        from gguf import quants

        stored = self._tensors[self._stored_name(name) or ""]
        values = torch.from_numpy(quants.dequantize(stored.data, stored.tensor_type).copy())
        if self._interleaved and ".q_proj." in name:
            values = _rotary_halves(values, self._config.num_attention_heads)
        if self._interleaved and ".k_proj." in name:
            values = _rotary_halves(values, self._config.num_key_value_heads)
        if self._norm_offset and name.endswith("norm.weight"):
            values = values - self._norm_offset
        return values.float()


def _rotary_halves(weight: Tensor, heads: int) -> Tensor:
    """Undo ggml's interleaving: ``[heads, pairs, 2, …]`` to ``[heads, 2, pairs, …]``."""
    pairs = weight.shape[0] // heads // 2
    return weight.view(heads, pairs, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
