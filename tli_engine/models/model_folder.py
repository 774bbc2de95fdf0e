"""A whole model on disk, as transformers reads it: shards with an index, configuration, tokenizer."""

import copy
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tli_engine.errors import UserError
from tli_engine.models.files import ModelFiles
from tli_engine.models.hub import TOKENIZER_FILES
from tli_engine.models.sources import HEAD, INDEX, SINGLE

# of a shard, which is held in memory until it is written
SHARD_BYTES = 5 * 10**9

_CONFIG = "config.json"
_DECODER = "model."
_EMBEDDING = "embed_tokens.weight"


@dataclass(frozen=True)
class Layout:
    """What a whole model consists of; names are those of :class:`TensorSource`.

    Attributes:
        architecture: Name of transformers' class.
        shapes: Shape of every tensor, in the model's order; no head where it is tied.
        linears: The weights of the blocks' linear layers.
    """

    architecture: str
    shapes: dict[str, tuple[int, ...]]
    linears: frozenset[str]


@dataclass(frozen=True)
class Written:
    """Tensors, bytes and files that a model takes; the dtype of its embeddings."""

    tensors: int
    nbytes: int
    files: int
    dtype: torch.dtype


def layout_of(config: Any) -> Layout:
    """Read a model's tensors off its configuration; none is made."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    shapes = {n.removeprefix(_DECODER): tuple(p.shape) for n, p in model.named_parameters()}
    if config.tie_word_embeddings:
        shapes.pop(HEAD, None)
    linears = {
        f"{name.removeprefix(_DECODER)}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(f"{_DECODER}layers.")
    }
    return Layout(type(model).__name__, shapes, frozenset(linears))


def stored_config(files: ModelFiles) -> dict[str, Any]:
    """The configuration as it lies beside the weights; empty for a GGUF file."""
    if files.gguf_file is not None:
        return {}
    values: dict[str, Any] = json.loads((files.folder / _CONFIG).read_text(encoding="utf-8"))
    return values


def is_stored_in_nf4(files: ModelFiles) -> bool:
    """Whether the model is a bitsandbytes NF4 checkpoint: any other quantisation is refused."""
    values = stored_config(files)
    return any("quantization_config" in v for v in (values, values.get("text_config", {})))


def write_folder(
    files: ModelFiles,
    layout: Layout,
    weights: Iterable[tuple[str, Mapping[str, Tensor]]],
    folder: Path,
    *,
    nf4: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Written:
    """Write a model into a folder; ``config.json`` comes last, so a folder with one is whole.

    Args:
        files: The model that configuration and tokenizer are taken from.
        layout: Of that model.
        weights: Each weight's name and the tensors it is stored in, by name; one is taken at a time.
        folder: Is there, and empty.
        nf4: Whether it is a bitsandbytes NF4 checkpoint, which its configuration then says.
        shard_bytes: A file of weights takes no more, unless one weight alone does.
    """
    shards = _Shards(folder, shard_bytes)
    dense, nested, dtype = [], False, torch.float32
    for name, tensors in weights:
        shards.add({_stored_name(n): t for n, t in tensors.items()})
        if name == _EMBEDDING:
            dtype = tensors[name].dtype
        if name in layout.linears and len(tensors) == 1:
            dense.append(_stored_name(name).removesuffix(".weight"))
        nested |= f"{name}.nested_absmax" in tensors
    shards.finish()
    _write_tokenizer(files, folder)
    config = _config(files, layout, dtype)
    if nf4:
        config["quantization_config"] = _quantization_config(dtype, nested, dense)
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / _CONFIG).write_text(f"{text}\n", encoding="utf-8")
    return Written(shards.tensors, shards.nbytes, shards.files, dtype)


def _stored_name(name: str) -> str:
    return name if name == HEAD else _DECODER + name


class _Shards:
    """Writes tensors into files of a limited size; holds those of one file."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._names: list[list[str]] = []
        self.tensors = self.nbytes = 0

    @property
    def files(self) -> int:
        return len(self._names)

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the tensors of one weight, which stay in one file."""
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        if self._held and self._held_bytes + nbytes > self._limit:
            self._write()
        self._held |= {name: _own(tensor) for name, tensor in tensors.items()}
        self._held_bytes += nbytes

    def finish(self) -> None:
        """Write what is held; name the files as their number wants it, and write the index."""
        self._write()
        if self.files == 1:
            self._part(1).rename(self._folder / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self._names, 1):
            file = f"model-{i:05d}-of-{self.files:05d}.safetensors"
            self._part(i).rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _part(self, i: int) -> Path:
        return self._folder / f"model-{i:05d}.part"

    def _write(self) -> None:
        self._names.append(list(self._held))
        path = self._part(self.files)
        save_file(self._held, path, metadata={"format": "pt"})
        # safetensors makes its files private
        path.chmod(0o644)
        self.tensors += len(self._held)
        self.nbytes += self._held_bytes
        self._held, self._held_bytes = {}, 0


def _own(tensor: Tensor) -> Tensor:
    """The tensor in memory of its own: safetensors refuses what shares any."""
    held = tensor.detach().cpu().contiguous()
    return held if held.untyped_storage().nbytes() == held.nbytes else held.clone()


def _write_tokenizer(files: ModelFiles, folder: Path) -> None:
    if files.gguf_file is not None:
        files.tokenizer.save_pretrained(folder)
        return
    for pattern in (*TOKENIZER_FILES, "generation_config.json"):
        for path in files.folder.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def _config(files: ModelFiles, layout: Layout, dtype: torch.dtype) -> dict[str, Any]:
    values = stored_config(files)
    if not values or "text_config" in values:
        # of a multimodal model the decoder alone is written
        values = json.loads(files.config.to_json_string())
    # code that lay beside the model is not copied
    for key in ("quantization_config", "auto_map", "_name_or_path"):
        values.pop(key, None)
    key = "torch_dtype" if "torch_dtype" in values else "dtype"
    return values | {"architectures": [layout.architecture], key: _spelled(dtype)}


def _quantization_config(
    dtype: torch.dtype, double_quant: bool, dense: list[str]
) -> dict[str, Any]:
    """What transformers saves of its ``BitsAndBytesConfig``."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "llm_int8_threshold": 6.0,
        # the head is left as it is by transformers too, unless other layers are named
        "llm_int8_skip_modules": ["lm_head", *dense] if dense else None,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": _spelled(dtype),
        "bnb_4bit_quant_storage": "uint8",
    }


def _spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(files: ModelFiles, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of a wrong shape, or with values that are not finite.

    Raises:
        UserError: It is so.
    """
    if tuple(tensor.shape) != shape:
        raise UserError(
            f"{files.name}: {name} is {list(tensor.shape)}, its config says {list(shape)}"
        )
    if not torch.isfinite(tensor).all():
        raise UserError(f"{files.name}: {name} holds NaN or inf; a model of it would be of no use")
