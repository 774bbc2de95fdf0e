"""Adapters on disk in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tli_engine.config import LoraConfig
from tli_engine.errors import UserError
from tli_engine.models.adapters import adapter_tensors, adapters, wrap
from tli_engine.models.early import EarlyModel
from tli_engine.models.whole_folder import whole_folder
from tli_engine.nn import NF4Linear

_KEY = re.compile(r"(?:base_model\.model\.)?(?:model\.)?(layers\.(\d+)\..+)\.lora_([AB])\.weight")
# options that change what an adapter computes, and the values that are understood
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None, {}),
    "kasa_config": (None, {}),
    "layer_replication": (None, []),
    "monteclora_config": (None, {}),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    # the other ways of initialising change the base weights too
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


@dataclass(frozen=True)
class LoadedAdapter:
    """What came of an adapter file: modules adapted, and those above the blocks that were built."""

    adapted: list[str]
    above: list[str]


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as it lies on disk: A and B by the name of the linear layer they adapt."""

    r: int
    alpha: float
    rslora: bool
    tensors: dict[str, tuple[Tensor, Tensor]]

    @property
    def scaling(self) -> float:
        """What B A is multiplied by; see :class:`LoRALinear`."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


def read_adapter(folder: Path) -> StoredAdapter:
    """Read the adapter in ``folder``, written here or by PEFT.

    Raises:
        UserError: A missing or broken file, or a kind of adapter that is not plain LoRA.
    """
    config = _read_config(folder)
    r, alpha = int(config["r"]), float(config["lora_alpha"])
    return StoredAdapter(r, alpha, bool(config.get("use_rslora")), _read_tensors(folder))


def save_adapter(
    model: EarlyModel, folder: Path, lora: LoraConfig, base_model: str, card: str
) -> None:
    """Write the adapter of ``model``; PEFT's ``PeftModel.from_pretrained`` reads it.

    Args:
        model: A model with adapters, all of one rank and alpha.
        folder: Made, whole or not at all; an earlier one of that name is replaced.
        lora: Its dropout is recorded; the rest is read off the adapters.
        base_model: Hub id or path recorded as the base model.
        card: Text of the model card, ``README.md``.

    Raises:
        UserError: The folder cannot be written.
    """
    config = _adapter_config(model, lora.dropout, base_model)
    tensors = {
        f"base_model.model.model.{name}": p.detach().cpu().contiguous()
        for name, p in adapter_tensors(model).items()
    }
    with whole_folder(folder) as part:
        save_file(tensors, part / "adapter_model.safetensors", metadata={"format": "pt"})
        (part / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        (part / "README.md").write_text(card, encoding="utf-8")
        # safetensors makes its files private
        (part / "adapter_model.safetensors").chmod(0o644)


def _adapter_config(model: EarlyModel, dropout: float, base_model: str) -> dict[str, Any]:
    """``adapter_config.json``, PEFT's ``LoraConfig``."""
    adapted = adapters(model)
    # read off the adapters: where training went on from another one, that one set them
    [(r, alpha, rslora)] = {(m.r, m.alpha, m.rslora) for m in adapted.values()}
    return {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": sorted({_block(name) for name in adapted}),
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": r,
        "target_modules": sorted({name.rpartition(".")[2] for name in adapted}),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": rslora,
    }


def load_adapter(model: EarlyModel, folder: Path, dropout: float = 0.0) -> LoadedAdapter:
    """Put the adapter in ``folder``, written here or by PEFT, on a model without adapters.

    Args:
        model: A model without adapters.
        folder: Holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        dropout: Dropout before the adapters while training.

    Raises:
        UserError: A missing or broken file, a kind of adapter that is not plain LoRA, or tensors
            that do not fit the model.
    """
    stored = read_adapter(folder)
    adapted, above = [], []
    for name, (a, b) in sorted(stored.tensors.items()):
        if model.depth <= _block(name) < model.config.num_hidden_layers:
            above.append(name)
            continue
        _check_fit(model, name, a, b, stored.r, folder)
        layer = wrap(
            model, name, r=stored.r, alpha=stored.alpha, dropout=dropout, rslora=stored.rslora
        )
        with torch.no_grad():
            layer.lora_A.weight.copy_(a)
            layer.lora_B.weight.copy_(b)
        adapted.append(name)
    if not adapted:
        raise UserError(
            f"{folder}: adapts nothing below block {model.depth}, all that is built here; its "
            f"lowest is {min(above, key=_block, default='none')}"
        )
    return LoadedAdapter(adapted, above)


def _block(name: str) -> int:
    return int(name.split(".")[1])


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{folder}: no adapter_config.json; not a PEFT adapter") from None
    except ValueError as e:
        raise UserError(f"{path}: not JSON: {e}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise UserError(f"{path}: peft_type is {kind!r}; only LORA is understood")
    for key, plain in _PLAIN.items():
        if config.get(key) not in plain:
            raise UserError(
                f"{path}: {key} = {config[key]!r} is not understood; only plain LoRA is"
            )
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"{path}: {key} is {value!r}; must be a positive number")
    return config


def _read_tensors(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    path = folder / "adapter_model.safetensors"
    if not path.is_file() and (folder / "adapter_model.bin").is_file():
        raise UserError(f"{folder}: only a pickled adapter_model.bin, which is never read")
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path}: cannot be read: {e}") from None
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in stored.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise UserError(f"{path}: {key} is not a LoRA tensor of a decoder block")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {key} holds NaN or inf; the adapter is damaged")
        halves.setdefault(match[1], {})[match[3]] = tensor
    for name, half in halves.items():
        if half.keys() != {"A", "B"}:
            raise UserError(f"{path}: {name} has lora_{next(iter(half))} without its other half")
    return {name: (half["A"], half["B"]) for name, half in halves.items()}


def _check_fit(model: EarlyModel, name: str, a: Tensor, b: Tensor, r: int, folder: Path) -> None:
    linear = dict(model.decoder.named_modules()).get(name)
    if not isinstance(linear, nn.Linear | NF4Linear):
        raise UserError(f"{folder}: adapts {name}, which is no linear layer of this model")
    shapes = [list(a.shape), list(b.shape)]
    expected = [[r, linear.in_features], [linear.out_features, r]]
    if shapes != expected:
        raise UserError(
            f"{folder}: {name} has lora_A and lora_B of {shapes}, this model needs {expected}; is "
            f"it the right base model?"
        )
