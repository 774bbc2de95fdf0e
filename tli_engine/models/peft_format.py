"""Adapters on disk in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tli_engine.config import LoraConfig
from tli_engine.errors import UserError
from tli_engine.models.adapters import adapter_tensors, adapters, wrap
from tli_engine.models.early import EarlyModel

_KEY = re.compile(r"(?:base_model\.model\.)?(?:model\.)?(layers\.(\d+)\..+)\.lora_([AB])\.weight")
# options that change what an adapter computes, and the only value that is understood
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
}


@dataclass(frozen=True)
class LoadedAdapter:
    """What came of an adapter file: modules adapted, and those above the blocks that were built."""

    adapted: list[str]
    above: list[str]


def save_adapter(
    model: EarlyModel, folder: Path, lora: LoraConfig, base_model: str, card: str
) -> None:
    """Write the adapter of ``model``; PEFT's ``PeftModel.from_pretrained`` reads it.

    Args:
        model: A model with adapters.
        folder: Written to; made if need be.
        lora: What the adapters were made from.
        base_model: Hub id or path recorded as the base model.
        card: Text of the model card, ``README.md``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    blocks = sorted({int(name.split(".")[1]) for name in adapters(model)})
    config = {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": blocks,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.r,
        "target_modules": sorted(lora.modules),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": lora.rslora,
    }
    tensors = {
        f"base_model.model.model.{name}": p.detach().cpu().contiguous()
        for name, p in adapter_tensors(model).items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "README.md").write_text(card, encoding="utf-8")


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
    config = _read_config(folder)
    tensors = _read_tensors(folder)
    adapted, above = [], []
    for name, (a, b) in sorted(tensors.items()):
        if int(name.split(".")[1]) >= model.depth:
            above.append(name)
            continue
        _check_fit(model, name, a, b, folder)
        layer = wrap(
            model,
            name,
            r=a.shape[0],
            alpha=float(config["lora_alpha"]),
            dropout=dropout,
            rslora=bool(config.get("use_rslora")),
        )
        with torch.no_grad():
            layer.lora_A.weight.copy_(a)
            layer.lora_B.weight.copy_(b)
        adapted.append(name)
    if not adapted:
        raise UserError(
            f"{folder}: adapts nothing below block {model.depth}, all that is built here; its "
            f"lowest is {min(above, default='none')}"
        )
    return LoadedAdapter(adapted, above)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{folder}: no adapter_config.json; not a PEFT adapter") from None
    except ValueError as e:
        raise UserError(f"{path}: not JSON: {e}") from None
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{path}: peft_type is {config.get('peft_type')!r}; only LORA is understood"
        )
    for key, plain in _PLAIN.items():
        if config.get(key) not in plain:
            raise UserError(
                f"{path}: {key} = {config[key]!r} is not understood; only plain LoRA is"
            )
    if not isinstance(config.get("lora_alpha"), int | float):
        raise UserError(f"{path}: lora_alpha is {config.get('lora_alpha')!r}; must be a number")
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


def _check_fit(model: EarlyModel, name: str, a: Tensor, b: Tensor, folder: Path) -> None:
    try:
        base = model.decoder.get_submodule(name)
    except AttributeError:
        raise UserError(f"{folder}: adapts {name}, which this model does not have") from None
    expected = [base.out_features, base.in_features]
    if [b.shape[0], a.shape[1]] != expected or b.shape[1] != a.shape[0]:
        raise UserError(
            f"{folder}: {name} adapts a {[b.shape[0], a.shape[1]]} weight, the model's is "
            f"{expected}; is it the right base model?"
        )
