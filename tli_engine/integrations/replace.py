"""Which layers of a model the engine runs, and how one becomes such a layer and stops being one.

Layers change their class and keep everything else: parameters, names, hooks, adapters.
"""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import chain
from typing import Any

from torch import nn

from tli_engine.errors import UserError
from tli_engine.integrations.frozen_weight import NotReplacedError, nf4_weight
from tli_engine.integrations.model_parts import offloads


class Kind:
    """A class of layers and what stands in for it.

    Attributes:
        name: For a reader.
        theirs: The class that is replaced, and those of its own library that only set options.
        ours: A subclass of the first with the engine's forward.
        check: Raises :class:`NotReplacedError` for a layer that cannot be run.
    """

    def __init__(
        self, name: str, theirs: tuple[type, ...], ours: type, check: Callable[[Any], None]
    ) -> None:
        self.name, self.theirs, self.ours, self.check = name, theirs, ours, check


def kinds() -> list[Kind]:
    """The classes that can be replaced, of the libraries that are installed; bases first."""
    found = []
    if find_spec("bitsandbytes"):
        found.append(_bitsandbytes())
    if find_spec("peft"):
        found += _peft()
    return found


def _bitsandbytes() -> Kind:
    import bitsandbytes as bnb
    from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module

    from tli_engine.integrations import bnb_layers

    def check(layer: Any) -> None:
        if not getattr(layer.weight, "bnb_quantized", False):
            raise NotReplacedError("not quantised yet; move the model to its device first")
        fix_4bit_weight_quant_state_from_module(layer)
        # as it will be read; an error now, not at the first call
        nf4_weight(layer.weight)

    theirs = (bnb.nn.Linear4bit, bnb.nn.LinearNF4)
    return Kind("bitsandbytes Linear4bit", theirs, bnb_layers.Linear4bit, check)


def _peft() -> Iterator[Kind]:
    from peft.tuners import lora

    from tli_engine.integrations import lora_layers

    def check_dense(layer: Any) -> None:
        if type(layer.get_base_layer()) is not nn.Linear:
            base = type(layer.get_base_layer()).__name__
            raise NotReplacedError(f"LoRA over {base}; over Linear and Linear4bit it is replaced")

    if find_spec("bitsandbytes"):
        from peft.tuners.lora import bnb as peft_bnb

        from tli_engine.integrations import lora_bnb_layers

        ours = lora_bnb_layers.Linear4bit
        yield Kind("LoRA over Linear4bit", (peft_bnb.Linear4bit,), ours, lambda _: None)
    yield Kind("LoRA over Linear", (lora.Linear,), lora_layers.Linear, check_dense)


def replace_layer(layer: nn.Module, kind: Kind) -> None:
    """Let the engine run a layer.

    Raises:
        NotReplacedError: It stays as it is.
    """
    if type(layer) not in kind.theirs:
        raise NotReplacedError(f"{type(layer).__name__} is a subclass with a forward of its own")
    if "forward" in layer.__dict__:
        raise NotReplacedError("its forward was replaced by another library")
    kind.check(layer)
    layer.__dict__[_THEIRS] = type(layer)
    layer.__class__ = kind.ours


_THEIRS = "_tli_engine_was"


def original_class(module: nn.Module) -> type | None:
    """The class that a replaced module had; ``None`` for others."""
    theirs: type | None = module.__dict__.get(_THEIRS)
    return theirs


def mark(module: nn.Module, ours: type) -> None:
    """Give a module another class, and note the one that it has."""
    module.__dict__[_THEIRS] = type(module)
    module.__class__ = ours


def put_back(module: nn.Module) -> None:
    """Give a replaced module its class back, and take away what was noted on it."""
    module.__class__ = module.__dict__[_THEIRS]
    for name in [name for name in module.__dict__ if name.startswith("_tli_engine_")]:
        del module.__dict__[name]


def check_model(model: Any) -> None:
    """Raise ``UserError`` for what cannot be accelerated as a whole."""
    if not isinstance(model, nn.Module):
        raise UserError(f"accelerate takes a model, got {type(model).__name__}")
    for name, module in model.named_modules():
        if offloads(getattr(module, "_hf_hook", None)):
            raise UserError(
                f"{name or 'the model'} is offloaded by accelerate's hooks; load the model onto one "
                f"device, with device_map={{'': 0}}"
            )
    held = chain(model.named_parameters(), model.named_buffers())
    on_meta = next((n for n, t in held if t.device.type == "meta"), None)
    if on_meta is not None:
        raise UserError(f"{on_meta} is on the meta device; load the weights first")
