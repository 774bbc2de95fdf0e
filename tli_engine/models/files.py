"""A model by name: a folder, a GGUF file, a Hub id or a built-in, opened without its weights."""

import json
import struct
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

from tli_engine.errors import UserError
from tli_engine.models import builtin, hub
from tli_engine.models.sources import GgufSource, SafetensorsSource, TensorSource
from tli_engine.models.tokenizer import LOCAL_FILES, file_identity, first_line, load_tokenizer

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")


@dataclass(frozen=True)
class ModelFiles:
    """An opened model.

    Attributes:
        name: What the user called it.
        hub_id: What PEFT should call the base model.
        folder: Where config and tokenizer lie.
        gguf_file: Name of the GGUF file in ``folder``, if it is one.
        revision: Commit of a model on the Hub.
        config: The decoder's transformers configuration, of the whole model.
        source: Its tensors.
    """

    name: str
    hub_id: str
    folder: Path
    gguf_file: str | None
    config: Any
    source: TensorSource
    revision: str | None = None

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return load_tokenizer(self.name, self.folder, self.gguf_file)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens at which the model's authors end a text: ``eos_token_id`` of its configurations.

        Raises:
            UserError: ``generation_config.json`` is not JSON, or its ``eos_token_id`` names no tokens.
        """
        path = self.folder / "generation_config.json"
        try:
            # beside a GGUF file it may be another model's
            there = self.gguf_file is None and path.is_file()
            generation = json.loads(path.read_text(encoding="utf-8")) if there else {}
            stated = [getattr(self.config, "eos_token_id", None), generation.get("eos_token_id")]
        except (OSError, ValueError, AttributeError) as e:
            raise UserError(f"{path}: not a generation's configuration: {e}") from None
        tokens = [t for s in stated if s is not None for t in (s if isinstance(s, list) else [s])]
        if wrong := [t for t in tokens if type(t) is not int]:
            raise UserError(f"{path}: eos_token_id: {json.dumps(wrong[0])} is no token's number")
        return tuple(sorted(set(tokens)))


def open_model(name: str) -> ModelFiles:
    """Open a model by name; no weights are read.

    Args:
        name: A Hugging Face folder, a ``.gguf`` file, ``builtin:smollm2-135m``, or a Hub id,
            ``organisation/name`` with an optional ``@revision``.

    Raises:
        UserError: No such model, or a family that is not supported, with those that are.
    """
    if name.startswith("builtin:"):
        model = builtin.find(name)
        return _open_folder(name, model.folder(), model.hub_id)
    path = Path(name)
    if path.is_dir():
        return _open_folder(name, path, name)
    if path.suffix == ".gguf":
        return _open_gguf(name, path)
    hub_id, _ = hub.split_revision(name)
    if hub_id.count("/") == 1 and not name.startswith((".", "/", "~")):
        folder = hub.fetch_folder(name)
        # the snapshot's folder goes by its commit: all files come from that one
        fetch = partial(hub.fetch_file, name, commit=folder.name)
        return replace(_open_folder(name, folder, hub_id, fetch), revision=folder.name)
    raise UserError(
        f"{name}: no such model; give a Hugging Face folder, a .gguf file, a Hub id or "
        f"{builtin.names()}"
    )


def _open_folder(
    name: str, folder: Path, hub_id: str, fetch: Callable[[str], Path | None] | None = None
) -> ModelFiles:
    def local(file: str) -> Path | None:
        return folder / file if (folder / file).is_file() else None

    config, _ = open_config(name, folder)
    return ModelFiles(name, hub_id, folder, None, config, SafetensorsSource(name, fetch or local))


def open_config(name: str, folder: Path) -> tuple[Any, dict[str, Any] | None]:
    """Read a folder's configuration, checked; and bitsandbytes' settings, if it is stored in NF4.

    Raises:
        UserError: It is not there, not whole, or of a model that is not supported.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no config.json; not a Hugging Face model folder") from None
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: not JSON: {e}") from None
    text = values.get("text_config", values) if isinstance(values, dict) else None
    if not isinstance(text, dict):
        raise UserError(f"{path}: not a model's configuration")
    _check_family(name, str(text.get("model_type", values.get("model_type"))))
    try:
        config = AutoConfig.from_pretrained(folder, **LOCAL_FILES).get_text_config()
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as e:
        raise UserError(f"{path}: not a whole configuration: {first_line(e)}") from None
    # of a multimodal model it stands beside the text's configuration
    quantised = values.get("quantization_config", text.get("quantization_config"))
    _check_quantisation(name, quantised)
    return config, quantised


def _open_gguf(name: str, path: Path) -> ModelFiles:
    config, source = _gguf_parts(name, path, file_identity(path))
    # a model may note in its configuration how it runs
    return ModelFiles(name, name, path.parent, path.name, deepcopy(config), source)


@lru_cache(maxsize=2)
def _gguf_parts(name: str, path: Path, identity: tuple[int, ...]) -> tuple[Any, GgufSource]:
    """Configuration and tensors of a file, read once: a large vocabulary takes many seconds."""
    config = open_gguf_config(name, path)
    return config, GgufSource(path, deepcopy(config))


def open_gguf_config(name: str, path: Path) -> Any:
    """Read the configuration in a GGUF file's header, checked.

    Raises:
        UserError: It is not there, not whole, or of a model that is not supported.
    """
    from transformers import AutoConfig

    if not path.is_file():
        raise UserError(f"{path}: no such GGUF file")
    with path.open("rb") as f:
        if f.read(4) != b"GGUF":
            raise UserError(f"{path}: not a GGUF file")
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, **LOCAL_FILES)
    except (OSError, ValueError, KeyError, IndexError, NotImplementedError, struct.error) as e:
        raise UserError(f"{path}: its header cannot be read: {first_line(e)}") from None
    config = config.get_text_config()
    _check_family(name, config.model_type)
    return config


def _check_family(name: str, family: str) -> None:
    if family not in FAMILIES:
        raise UserError(
            f"{name}: family {family!r} is not supported; those are {', '.join(FAMILIES)}"
        )


def _check_quantisation(name: str, stored: dict[str, Any] | None) -> None:
    """Only bitsandbytes' NF4 is read; another quantisation is refused by its name."""
    if stored is None:
        return
    method = stored.get("quant_method")
    # bitsandbytes notes a 4-bit type beside 8-bit weights too
    kind = "int8" if stored.get("load_in_8bit") else stored.get("bnb_4bit_quant_type")
    if method != "bitsandbytes" or kind != "nf4":
        raise UserError(
            f"{name}: is quantised by {method} {kind or ''}".rstrip()
            + "; only full-precision and bitsandbytes NF4 checkpoints are read"
        )
