"""LoRA on chosen blocks and projections of an ``EarlyModel``."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from tli_engine.config import LoraConfig
from tli_engine.errors import UserError
from tli_engine.models.early import EarlyModel
from tli_engine.nn import NF4Linear

# the layers of a block that read its input, adapted or not
_READS_INPUT = re.compile(r"\.[qkv]_proj(\.base_layer)?$")


class LoRALinear(nn.Module):
    r"""A frozen linear layer and its low-rank update, :math:`y = Wx + s\,BA\,x`.

    Source: Hu et al. 2021, eq. 3; scaling :math:`s = \alpha / r`, or :math:`\alpha / \sqrt r` for
    rsLoRA (Kalajdzievski 2023). Module and parameter names are PEFT's.

    A and B are fp32 beside 16-bit weights. On a dense layer the update is computed in fp32, as by
    PEFT. On an NF4 layer it rides along in one op, in ``x``'s dtype: A, B and what lies between are
    rounded to it, so that in 16 bits output and gradients are PEFT's but for these roundings: a
    relative error (of the norm) under the dtype's eps, 4e-3 in bf16 and 4e-4 in fp16 where it was
    measured (CPU, K = 128). In fp32 they are PEFT's up to the order of sums, 1e-6. Dropout
    there is a mask of one seed a call, drawn from torch's generator of ``x``'s device.
    """

    def __init__(
        self, base_layer: nn.Linear | NF4Linear, r: int, alpha: float, rslora: bool, dropout: float
    ) -> None:
        super().__init__()
        # not an NF4 layer's weight, which undoes the kernels' layout
        held = base_layer if isinstance(base_layer, NF4Linear) else base_layer.weight
        # adapters are trained in fp32 beside bf16 weights, as PEFT does
        dtype, device = torch.promote_types(held.dtype, torch.float32), held.device
        self.base_layer = base_layer
        # nn.Linear's own values would be thrown away, and draw from the caller's random numbers
        options = {"bias": False, "device": device, "dtype": dtype}
        self.lora_A: nn.Linear = skip_init(nn.Linear, base_layer.in_features, r, **options)  # type: ignore[no-untyped-call]
        self.lora_B: nn.Linear = skip_init(nn.Linear, r, base_layer.out_features, **options)  # type: ignore[no-untyped-call]
        self.dropout = nn.Dropout(dropout)
        self.r, self.alpha, self.rslora = r, alpha, rslora
        self.scaling = alpha / math.sqrt(r) if rslora else alpha / r
        self.active = True

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted projection of ``x``, ``[…, K]`` to ``[…, N]``, in ``x``'s dtype."""
        if self.active and isinstance(self.base_layer, NF4Linear):
            return self._forward_nf4(self.base_layer, x)
        y: Tensor = self.base_layer(x)
        if not self.active:
            return y
        update = self.lora_B(self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype))))
        adapted: Tensor = y + update * self.scaling
        return adapted.to(y.dtype)

    def _forward_nf4(self, base_layer: NF4Linear, x: Tensor) -> Tensor:
        dropout, seed = self.dropout.p if self.dropout.training else 0.0, None
        if dropout > 0:
            # drawn on the device, which no one waits for; set by torch.manual_seed
            seed = torch.randint(2**63 - 1, (), device=x.device)
        A, B = self.lora_A.weight, self.lora_B.weight
        return base_layer.lora_forward(x, A, B, self.scaling, dropout=dropout, seed=seed)


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
    layers = {n: m for n, m in model.decoder.named_modules() if isinstance(m, NF4Linear)}
    blocks = {name: int(name.split(".")[1]) for name in layers if name.startswith("layers.")}
    first = min((int(name.split(".")[1]) for name in adapters(model)), default=len(model.blocks))
    for name, block in blocks.items():
        # nothing below the first adapted block is trained: its input needs no gradient
        if block > first or (block == first and not _READS_INPUT.search(name)):
            layers[name].add_transposed_copy()
    nbytes = sum(layer.nbytes for layer in layers.values())
    return nbytes, sum(layer.transposed_nbytes for layer in layers.values())


def adapter_tensors(model: EarlyModel) -> dict[str, nn.Parameter]:
    """The trainable tensors by name, e.g. ``layers.0.self_attn.q_proj.lora_A.weight``."""
    return {
        f"{name}.lora_{letter}.weight": getattr(adapter, f"lora_{letter}").weight
        for name, adapter in adapters(model).items()
        for letter in "AB"
    }


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
