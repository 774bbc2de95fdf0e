"""A model by name, without its weights: its configuration, and which bytes would be downloaded."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tli_engine.errors import UserError
from tli_engine.models import builtin, hub
from tli_engine.models.early import EarlyModel
from tli_engine.models.files import open_config, open_gguf_config
from tli_engine.models.sources import HEAD, INDEX, SINGLE, decoder_prefix
from tli_engine.models.tokenizer import load_tokenizer

# bytes of an element where a configuration names no dtype
_USUAL = 2


@dataclass(frozen=True)
class Survey:
    """What can be known of a model before it is downloaded.

    Attributes:
        name: What the user called it.
        config: The decoder's transformers configuration, of the whole model.
        folder: Where configuration and tokenizer lie, if they do.
        gguf_file: Name of the GGUF file in ``folder``, if it is one.
        quantised: bitsandbytes' settings of a checkpoint that is stored in NF4, or None.
        missing: Bytes of the files that hold tensors of these names and are not here; and whether all of
            them are known to the byte.
        converted: Bytes that its conversion writes beside the download, once.
    """

    name: str
    config: Any
    folder: Path | None
    gguf_file: str | None = None
    quantised: dict[str, Any] | None = None
    missing: Callable[[Iterable[str]], tuple[int, bool]] = lambda names: (0, True)
    converted: int = 0

    @property
    def stored_bytes(self) -> int:
        """Bytes of a stored element, of a model that is stored unquantised."""
        if self.gguf_file is not None:
            # it is dequantised as it is read
            return 4
        return getattr(getattr(self.config, "dtype", None), "itemsize", _USUAL)

    def tokenizer(self) -> Any:
        """The model's tokenizer; None where it is not here."""
        if self.folder is None:
            return None
        return load_tokenizer(self.name, self.folder, self.gguf_file)


def survey(name: str) -> Survey:
    """Look at a model without its weights; of one on the Hub, configuration and tokenizer are fetched.

    Args:
        name: As for :func:`tli_engine.models.files.open_model`.

    Raises:
        UserError: No such model, or a family that is not supported.
    """
    if name.startswith("builtin:"):
        return _survey_builtin(name)
    path = Path(name)
    if path.is_dir():
        config, quantised = open_config(name, path)
        return Survey(name, config, path, quantised=quantised)
    if path.suffix == ".gguf":
        return Survey(name, open_gguf_config(name, path), path.parent, path.name)
    hub_id, _ = hub.split_revision(name)
    if hub_id.count("/") == 1 and not name.startswith((".", "/", "~")):
        folder = hub.fetch_folder(name)
        config, quantised = open_config(name, folder)
        missing = partial(_missing_on_hub, name, folder.name, config)
        return Survey(name, config, folder, quantised=quantised, missing=missing)
    raise UserError(
        f"{name}: no such model; give a Hugging Face folder, a .gguf file, a Hub id or "
        f"{builtin.names()}"
    )


def _survey_builtin(name: str) -> Survey:
    from transformers import AutoConfig

    model = builtin.find(name)
    if (folder := model.converted()) is not None:
        return Survey(name, open_config(name, folder)[0], folder)
    config = AutoConfig.for_model(**model.config)
    return Survey(
        name,
        config,
        None,
        missing=lambda names: (model.wheel_bytes, True),
        converted=4 * sum(sizes_of(config).values()),
    )


def model_without_memory(config: Any, depth: int) -> EarlyModel:
    """The first blocks of a model on torch's meta device, which has shapes and no values."""
    with torch.device("meta"):
        return EarlyModel(config, depth)


def sizes_of(config: Any) -> dict[str, int]:
    """Elements of each tensor of a whole model, by its name within the decoder; nothing is allocated."""
    decoder = model_without_memory(config, config.num_hidden_layers).decoder
    sizes = {name: parameter.numel() for name, parameter in decoder.named_parameters()}
    if not config.tie_word_embeddings:
        sizes[HEAD] = config.vocab_size * config.hidden_size
    return sizes


def _missing_on_hub(name: str, commit: str, config: Any, names: Iterable[str]) -> tuple[int, bool]:
    """Bytes of a Hub model's files with these tensors that are not in the cache."""
    sizes = sizes_of(config)
    stored = getattr(getattr(config, "dtype", None), "itemsize", _USUAL)
    index = hub.fetch_file(name, INDEX, commit=commit)
    if index is None:
        files, prefix = dict.fromkeys(sizes, SINGLE), ""
    else:
        files = json.loads(index.read_text("utf-8"))["weight_map"]
        prefix = decoder_prefix(name, files)
    wanted = {_stored_name(n, prefix) for n in names}
    total, exact = 0, True
    for file in sorted({f for n, f in files.items() if n in wanted}):
        if hub.is_cached(name, file, commit):
            continue
        found = hub.file_bytes(name, file, commit)
        exact &= found is not None
        own = (size for n, size in sizes.items() if files.get(_stored_name(n, prefix)) == file)
        total += stored * sum(own) if found is None else found
    return total, exact


def _stored_name(name: str, prefix: str) -> str:
    return prefix.removesuffix("model.") + name if name == HEAD else prefix + name
