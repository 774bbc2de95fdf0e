"""Linear layers that read the same input, as one product with their adapters."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tli_engine import nf4
from tli_engine.models.lora import LoRALinear
from tli_engine.nn import NF4Linear
from tli_engine.ops import dense_lora_linear

Linear = nn.Linear | NF4Linear


class NotFusedError(Exception):
    """A model, or an adapter, that the fused blocks do not run; the message says why."""


class Projection:
    """Layers of one module joined row by row: q, k and v, say, or gate and up; or one alone.

    The layers stay where they are, with their names and values, and share the joined storage. So do
    their adapters: ``lora_A`` and ``lora_B`` are the tensors that gradients reach, and the layers'
    own parameters are views of them. A layer without an adapter beside adapted ones has one of
    zeros, which stays zero: either factor's gradient is a product with the other.

    Attributes:
        name: The layers' names, joined.
        sizes: Rows of each layer.
        layer: The joined layer; frozen, but for full fine-tuning of one that is not NF4.
        adapters: Those there are, by the layer's number.
        lora_A: ``[layers * r, K]``, fp32, or ``None`` without adapters.
        lora_B: ``[N, r]``, fp32, or ``None``.

    Raises:
        NotFusedError: The layers differ in kind, or their adapters in rank, scaling or dropout.
    """

    lora_A: nn.Parameter | None = None
    lora_B: nn.Parameter | None = None

    def __init__(self, owner: nn.Module, prefix: str, names: Sequence[str]) -> None:
        """Join ``names`` of ``owner``; ``prefix`` is the owner's own name."""
        self._owner = owner
        self._modules = [getattr(owner, name) for name in names]
        self._names = [f"{prefix}.{name}" for name in names]
        self.name = f"{prefix}.{'+'.join(names)}"
        layers: list[Linear] = [
            m.base_layer if isinstance(m, LoRALinear) else m for m in self._modules
        ]
        self.sizes = [layer.out_features for layer in layers]
        self.layer = layers[0] if len(layers) == 1 else _join(layers)
        self.adapters = {i: m for i, m in enumerate(self._modules) if isinstance(m, LoRALinear)}
        if self.adapters:
            self._join_adapters()

    @property
    def drops(self) -> bool:
        """Whether a call needs a seed: the adapters are on, and training with dropout."""
        if not self.adapters:
            return False
        first = next(iter(self.adapters.values()))
        return first.active and first.dropout.training and first.dropout.p > 0

    @property
    def keeps_input(self) -> bool:
        """Whether the way back needs what the layer read."""
        adapted = any(adapter.active for adapter in self.adapters.values())
        dense = not isinstance(self.layer, NF4Linear) and self.layer.weight.requires_grad
        return adapted or dense

    def __call__(self, x: Tensor, seed: Tensor | None = None) -> Tensor:
        """Return the joined product of ``x``, ``[T, K]`` to ``[T, N]``, adapters included.

        ``seed``, an int64 on ``x``'s device, chooses the dropout mask; drawn if it is None.
        """
        first = next(iter(self.adapters.values()), None)
        if first is None or not first.active or self.lora_A is None or self.lora_B is None:
            y: Tensor = self.layer(x)
            return y
        dropout = 0.0
        if self.drops:
            dropout = first.dropout.p
            if seed is None:
                seed = torch.randint(2**63 - 1, (), device=x.device)
        options: dict[str, Any] = {
            "sizes": self.sizes,
            "dropout": dropout,
            "seed": seed if dropout else None,
        }
        adapter = (self.lora_A, self.lora_B, first.scaling)
        if isinstance(self.layer, NF4Linear):
            return self.layer.lora_forward(x, *adapter, **options)
        return dense_lora_linear(x, self.layer.weight, *adapter, self.layer.bias, **options)

    def joined(self) -> dict[str, nn.Parameter]:
        """The joined adapters by name; none without adapters."""
        if self.lora_A is None or self.lora_B is None:
            return {}
        return {f"{self.name}.lora_A": self.lora_A, f"{self.name}.lora_B": self.lora_B}

    def joined_weights(self) -> dict[str, nn.Parameter]:
        """The joined layer's parameters by name; none of a layer alone, or in NF4."""
        if len(self._names) == 1 or isinstance(self.layer, NF4Linear):
            return {}
        return {f"{self.name}.{n}": p for n, p in self.layer.named_parameters()}

    def stand_in(self) -> None:
        """Put the joined layer into its owner in place of the layers, which are given up.

        Its parameters are then the model's own, by :meth:`joined_weights`' names, and may be replaced.
        """
        if not self.joined_weights():
            return
        leaves = [name.rpartition(".")[2] for name in self._names]
        for leaf in leaves:
            delattr(self._owner, leaf)
        self._owner.add_module("+".join(leaves), self.layer)
        self._modules = []

    def split(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """One of :meth:`joined_weights` as the layers' own, by their names: views of its rows."""
        kind = name.rpartition(".")[2]
        parts = torch.split(tensor, self.sizes)
        return {f"{own}.{kind}": rows for own, rows in zip(self._names, parts, strict=True)}

    def views(self) -> list[nn.Parameter]:
        """The modules' own parameters that are views of joined ones: no gradient reaches them."""
        views: list[nn.Parameter] = []
        for adapter in self.adapters.values():
            views += (*adapter.lora_A.parameters(), *adapter.lora_B.parameters())
        if self.joined_weights():
            for module in self._modules:
                layer = module.base_layer if isinstance(module, LoRALinear) else module
                views += layer.parameters()
        return views

    def parts(self) -> Iterator[tuple[str, nn.Parameter, str, slice]]:
        """The adapters' own parameters: name, parameter, name of the joined one, rows there."""
        first = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        for i, adapter in self.adapters.items():
            own = {
                "A": slice(i * adapter.r, (i + 1) * adapter.r),
                "B": slice(first[i], first[i] + self.sizes[i]),
            }
            for letter, rows in own.items():
                parameter = getattr(adapter, f"lora_{letter}").weight
                name = f"{self._names[i]}.lora_{letter}.weight"
                yield name, parameter, f"{self.name}.lora_{letter}", rows

    def expose(self) -> None:
        """Make the adapters' own parameters views of the joined ones, after those have moved."""
        joined = self.joined()
        for _, parameter, whole, rows in self.parts():
            parameter.data = joined[whole].detach()[rows]

    def _join_adapters(self) -> None:
        kinds = {(m.r, m.scaling, m.dropout.p) for m in self.adapters.values()}
        if len(kinds) > 1:
            raise NotFusedError(f"{self.name}: adapters differ in rank, scaling or dropout")
        first = next(iter(self.adapters.values()))
        like = first.lora_A.weight.detach()
        self.lora_A = nn.Parameter(like.new_zeros(len(self.sizes) * first.r, like.shape[1]))
        self.lora_B = nn.Parameter(like.new_zeros(sum(self.sizes), first.r))
        joined = self.joined()
        with torch.no_grad():
            for _, parameter, whole, rows in self.parts():
                joined[whole][rows] = parameter
        self.expose()


def _join(layers: Sequence[Linear]) -> Linear:
    """One layer of all rows; ``layers`` become views of it."""
    kinds = {type(layer) for layer in layers}
    if len(kinds) > 1 or len({layer.bias is None for layer in layers}) > 1:
        raise NotFusedError("layers that share an input are of several kinds")
    biases = [layer.bias for layer in layers if layer.bias is not None]
    bias = torch.cat([b.detach() for b in biases]) if biases else None
    quantised = [layer for layer in layers if isinstance(layer, NF4Linear)]
    if quantised:
        return _join_nf4(quantised, bias)
    dense = [layer for layer in layers if isinstance(layer, nn.Linear)]
    weight = torch.cat([layer.weight.detach() for layer in dense])
    joined = nn.Linear(weight.shape[1], len(weight), bias=bias is not None, device="meta")
    trained = any(layer.weight.requires_grad for layer in dense)
    joined.weight = nn.Parameter(weight, requires_grad=trained)
    sizes = [layer.out_features for layer in dense]
    for layer, rows in zip(dense, torch.split(weight, sizes), strict=True):
        layer.weight.data = rows
    if bias is not None:
        joined.bias = nn.Parameter(bias, requires_grad=trained)
        for layer, part in zip(dense, torch.split(bias, sizes), strict=True):
            layer.bias.data = part
    return joined


def _join_nf4(layers: Sequence[NF4Linear], bias: Tensor | None) -> NF4Linear:
    joined = NF4Linear(
        nf4.concatenate([layer.weight for layer in layers]),
        bias,
        numerics=layers[0].numerics,
        weight_residency=layers[0].weight_residency,
    )
    first = 0
    for layer in layers:
        layer.share_rows(joined, first)
        first += layer.out_features
    return joined
