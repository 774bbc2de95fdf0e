"""LoRA on chosen blocks and projections of an ``EarlyModel``."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tli_engine.config import LoraConfig
from tli_engine.errors import UserError
from tli_engine.models.early import EarlyModel


class LoRALinear(nn.Module):
    r"""A frozen linear layer and its low-rank update, :math:`y = Wx + s\,BA\,x`.

    Source: Hu et al. 2021, eq. 3; scaling :math:`s = \alpha / r`, or :math:`\alpha / \sqrt r` for
    rsLoRA (Kalajdzievski 2023). Module and parameter names are PEFT's.
    """

    def __init__(
        self, base_layer: nn.Linear, r: int, scaling: float, dropout: float, dtype: torch.dtype
    ) -> None:
        super().__init__()
        device = base_layer.weight.device
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, r, False, device=device, dtype=dtype)
        self.lora_B = nn.Linear(r, base_layer.out_features, False, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.scaling = scaling
        self.active = True

    def forward(self, x: Tensor) -> Tensor:
        """Return the adapted projection of ``x``, ``[…, K]`` to ``[…, N]``, in ``x``'s dtype."""
        y: Tensor = self.base_layer(x)
        if not self.active:
            return y
        update = self.lora_B(self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype))))
        adapted: Tensor = y + update * self.scaling
        return adapted.to(y.dtype)


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
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UserError(f'lora.layers: {text!r} is not of the form "0-1", "0,2,5-7" or "all"')
        blocks.update(range(int(first), int(last or first) + 1))
    if beyond := [b for b in blocks if b >= total]:
        raise UserError(f"lora.layers: the model has blocks 0-{total - 1}, none {max(beyond)}")
    if not blocks:
        raise UserError(f"lora.layers: {text!r} names no block")
    return sorted(blocks)


def _projections(model: EarlyModel) -> list[str]:
    return [n for n, m in model.blocks[0].named_modules() if isinstance(m, nn.Linear)]


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
    for module in lora.modules:
        if not any(p == module or p.endswith(f".{module}") for p in projections):
            known = ", ".join(p.rpartition(".")[2] for p in projections)
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
    """Put an adapter around the linear layer called ``name`` in ``model.decoder``."""
    parent, _, leaf = name.rpartition(".")
    owner = model.decoder.get_submodule(parent)
    base_layer = getattr(owner, leaf)
    # adapters are trained in fp32 beside bf16 weights, as PEFT does
    dtype = torch.promote_types(base_layer.weight.dtype, torch.float32)
    scaling = alpha / math.sqrt(r) if rslora else alpha / r
    adapted = LoRALinear(base_layer, r, scaling, dropout, dtype)
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
    adapted = adapters(model).values()
    for adapter in adapted:
        adapter.active = False
    try:
        yield
    finally:
        for adapter in adapted:
            adapter.active = True
