"""Layers that the engine does not run although it knows what they are, and why: for the summary."""

from importlib.util import find_spec
from typing import Any

from torch import nn

from tli_engine.integrations.replace import original_class


def why_peft(layer: Any) -> str | None:
    """Why PEFT computes a replaced layer's adapter at every call; ``None``: the engine does, or may.

    What a script turns on and off as it runs, several adapters or autocast say, is looked at in each call.
    """
    from tli_engine.integrations.lora_layers import plain_update

    name = _active_adapter(layer)
    if name is None:
        return None
    variant = _variant(layer, name)
    if variant is not None:
        return f"{variant}: PEFT computes the adapter"
    if layer.lora_B[name].bias is not None:
        return "lora_bias=True: PEFT computes the adapter"
    if hasattr(layer.base_layer, "quant_state") and original_class(layer.base_layer) is None:
        return "LoRA over a 4-bit layer that is left as it is"
    if plain_update(layer) is None and _dropout(layer, name) == 0:
        return "hooks, several dtypes or other modules in the adapter: PEFT computes it"
    return None


def why_peft_in_training(layer: Any) -> str | None:
    """Why PEFT computes a replaced layer's adapter in training alone; ``None``: the engine does."""
    name = _active_adapter(layer)
    p = 0.0 if name is None or why_peft(layer) is not None else _dropout(layer, name)
    return f"lora_dropout={p:g}: PEFT computes the adapter" if p else None


def why_unknown(layer: nn.Module) -> str | None:
    """Why a layer of bitsandbytes or PEFT that has no stand-in stays as it is; ``None``: it is no such layer."""
    if not find_spec("bitsandbytes"):
        return None
    import bitsandbytes as bnb

    if isinstance(layer, bnb.nn.Linear8bitLt):
        return "holds 8-bit data; the kernels read nf4"
    if find_spec("peft"):
        from peft.tuners.lora import bnb as peft_bnb

        if isinstance(layer, peft_bnb.Linear8bitLt):
            return "LoRA over Linear8bitLt; over Linear and Linear4bit it is replaced"
    return None


def _active_adapter(layer: Any) -> str | None:
    """The one adapter that is on; ``None`` where there is none, or several, or it is merged."""
    if not hasattr(layer, "lora_A") or layer.disable_adapters or layer.merged:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    return active[0] if len(active) == 1 else None


def _variant(layer: Any, name: str) -> str | None:
    if getattr(layer, "use_dora", {}).get(name, False):
        return "DoRA"
    variant = getattr(layer, "lora_variant", {}).get(name)
    return None if variant is None else type(variant).__name__


def _dropout(layer: Any, name: str) -> float:
    """The adapter's dropout in training; 0 where it has none."""
    return float(getattr(layer.lora_dropout[name], "p", 0.0))
