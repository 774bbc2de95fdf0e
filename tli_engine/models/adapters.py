"""LoRA on chosen blocks and projections of an ``EarlyModel``."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from tli_engine.config import LoraConfig
from tli_engine.errors import UserError
from tli_engine.models.early import EarlyModel
from tli_engine.models.lora import LoRALinear
from tli_engine.nn import NF4Linear

# the layers of a block that read its input, adapted or not
_READS_INPUT = re.compile(r"\.[qkv]_proj(\+[kv]_proj)*(\.base_layer)?$")


def parse_layers(text: str, total: int) -> list[int]:
    """Parse block numbers such as ``"0-1"``, ``"0,2,5-7"`` or ``"all"``.

    Raises:
        UserError: Not of this form, or a block that the model does not have.
    """
    if text.strip() == "all":
        return list(range(total))
    blocks: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(f'lora.layers: {text!r} is not of the form "0-1", "0,2,5-7" or "all"')
        start, end = int(first), int(last or first)
        if start > end:
            raise UserError(f"lora.layers: {part.strip()!r} names no block; the lower one is first")
        if end >= total:
            raise UserError(f"lora.layers: the model has blocks 0-{total - 1}, none {end}")
        blocks.update(range(start, end + 1))
    return sorted(blocks)


def _projections(model: EarlyModel) -> list[str]:
    return [n for n, m in model.blocks[0].named_modules() if isinstance(m, nn.Linear | NF4Linear)]


def select_modules(model: EarlyModel, lora: LoraConfig, loss_layer: int) -> list[str]:
    """Names of the linear layers to adapt, within ``model.decoder``.

    Raises:
        UserError: A block that the loss at ``hidden_states[loss_layer]`` does not reach, or a
            module name that matches no linear layer; the message lists what would match.
    """
    blocks = parse_layers(lora.layers, model.config.num_hidden_layers)
    if unreached := [b for b in blocks if b >= loss_layer]:
        raise UserError(
            f"lora.layers: no gradient reaches block {unreached[0]}: the loss reads "
            f"hidden_states[{loss_layer}], the output of block {loss_layer - 1}; choose blocks "
            f"within 0-{loss_layer - 1}, or a higher align.layer"
        )
    projections = _projections(model)
    known = ", ".join(p.rpartition(".")[2] for p in projections)
    if not lora.modules:
        raise UserError(f"lora.modules: is empty; choose among {known}")
    for module in lora.modules:
        if not any(p == module or p.endswith(f".{module}") for p in projections):
            raise UserError(f"lora.modules: {module!r} matches no linear layer; there are {known}")
    return [
        f"layers.{b}.{p}"
        for b in blocks
        for p in projections
        if any(p == m or p.endswith(f".{m}") for m in lora.modules)
    ]


def wrap(
    model: EarlyModel,
    name: str,
    *,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    rslora: bool = False,
) -> LoRALinear:
    """Put an adapter around a linear layer of ``model.decoder``; its A and B are yet to be set."""
    parent, _, leaf = name.rpartition(".")
    owner = model.decoder.get_submodule(parent)
    base_layer = getattr(owner, leaf)
    adapted = LoRALinear(base_layer, r, alpha, rslora, dropout)
    # a module starts in training mode, in which dropout would blur the model's evaluation
    adapted.train(model.training)
    setattr(owner, leaf, adapted)
    return adapted


def add_lora(model: EarlyModel, lora: LoraConfig, loss_layer: int, seed: int) -> list[str]:
    """Adapt ``model`` as ``lora`` says; A is Kaiming-uniform from ``seed``, B zero, as in PEFT.

    Returns:
        Names of the adapted linear layers.

    Raises:
        UserError: As :func:`select_modules`.
    """
    names = select_modules(model, lora, loss_layer)
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        adapted = wrap(
            model, name, r=lora.r, alpha=lora.alpha, dropout=lora.dropout, rslora=lora.rslora
        )
        a = torch.empty(adapted.lora_A.weight.shape)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            adapted.lora_A.weight.copy_(a)
            adapted.lora_B.weight.zero_()
    return names


def adapters(model: EarlyModel) -> dict[str, LoRALinear]:
    """The adapters by the name of the linear layer they adapt, within ``model.decoder``."""
    return {n: m for n, m in model.decoder.named_modules() if isinstance(m, LoRALinear)}


def add_transposed_copies(model: EarlyModel) -> tuple[int, int]:
    """Hold NF4 layers a second time, transposed, where kernels can use it: those gradients may pass.

    From the first adapted block on, these are all but the projections that read that block's input.

    Returns:
        Bytes of all NF4 layers, and of the copies among them.
    """
    layers = _nf4_layers(model)
    blocks = {name: int(name.split(".")[1]) for name in layers if name.startswith("layers.")}
    first = min((int(name.split(".")[1]) for name in adapters(model)), default=len(model.blocks))
    for name, block in blocks.items():
        if gradient_passes(name, block, first):
            layers[name].add_transposed_copy()
    nbytes = sum(layer.nbytes for layer in layers.values())
    return nbytes, sum(layer.transposed_nbytes for layer in layers.values())


def gradient_passes(name: str, block: int, first: int) -> bool:
    """Whether a gradient passes a layer of a block to its input; ``first`` is the first adapted one.

    Nothing below that block is trained: its own input needs no gradient.
    """
    return block > first or (block == first and not _READS_INPUT.search(name))


def nf4_blocks(model: EarlyModel) -> list[list[NF4Linear]]:
    """The layers of each block that hold NF4 weights: joined ones where the blocks are fused."""
    layers = _nf4_layers(model)
    return [
        [layer for name, layer in layers.items() if name.startswith(f"layers.{i}.")]
        for i in range(len(model.blocks))
    ]


def _nf4_layers(model: EarlyModel) -> dict[str, NF4Linear]:
    """The layers that hold NF4 weights, by name: joined ones where the blocks are fused."""
    if model.fused is None:
        named = model.decoder.named_modules()
    else:
        named = ((p.name, p.layer) for p in model.fused.projections())
    return {name: layer for name, layer in named if isinstance(layer, NF4Linear)}


def adapter_tensors(model: EarlyModel) -> dict[str, nn.Parameter]:
    """The trainable tensors by name, e.g. ``layers.0.self_attn.q_proj.lora_A.weight``."""
    return {
        f"{name}.lora_{letter}.weight": getattr(adapter, f"lora_{letter}").weight
        for name, adapter in adapters(model).items()
        for letter in "AB"
    }


def adapter_parameters(model: EarlyModel) -> int:
    """Numbers that the adapters train, and that are saved.

    Layers without one that fused blocks join to adapted ones have rows of zeros, which stay zeros and
    are none of them.
    """
    return sum(tensor.numel() for tensor in adapter_tensors(model).values())


@contextmanager
def adapters_off(model: EarlyModel) -> Iterator[None]:
    """Run the base model: inside, adapters do nothing."""
    # those that are on: an inner use must not switch on what an outer one has switched off
    active = [adapter for adapter in adapters(model).values() if adapter.active]
    for adapter in active:
        adapter.active = False
    try:
        yield
    finally:
        for adapter in active:
            adapter.active = True


@contextmanager
def adapter_strength(model: EarlyModel, strength: float) -> Iterator[None]:
    """Scale what the adapters add: inside, 1 is as trained, 0 the base model."""
    adapted = adapters(model).values()
    trained = [adapter.scaling for adapter in adapted]
    for adapter in adapted:
        adapter.scaling *= strength
    try:
        yield
    finally:
        for adapter, scaling in zip(adapted, trained, strict=True):
            adapter.scaling = scaling
