"""``accelerate``: a transformers model, adapters included, on this engine; ``restore`` undoes it."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tli_engine.errors import UserError
from tli_engine.integrations.frozen_weight import NotReplacedError
from tli_engine.integrations.lazy_model import make_lazy, settings_of
from tli_engine.integrations.left_layers import why_peft, why_peft_in_training, why_unknown
from tli_engine.integrations.replace import (
    Kind,
    check_model,
    kinds,
    original_class,
    put_back,
    replace_layer,
)


@dataclass
class Summary:
    """What :func:`accelerate` did.

    Attributes:
        replaced: What each replaced layer is, by its name in the model.
        kept: Why a layer that looks like one of those was left as it is, by its name.
        by_peft: Of :attr:`replaced`, layers whose adapter PEFT's own ``forward`` computes, DoRA say, and why.
        by_peft_in_training: The same of those that are the engine's but for training, where dropout is at work.
        lazy: Models whose hidden states are computed as they are read, by their names.
        eager: Why a model's are not, by its name.
        limits: The last hidden state that may be read of those of :attr:`lazy` that have a limit, by name;
            it holds until :func:`restore`, or another ``stop_at``.
        repacked_nbytes: Memory held beside the model's own weights.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    by_peft: dict[str, str] = field(default_factory=dict)
    by_peft_in_training: dict[str, str] = field(default_factory=dict)
    lazy: list[str] = field(default_factory=list)
    eager: dict[str, str] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    repacked_nbytes: int = 0

    def __str__(self) -> str:
        taken = Counter(kind for name, kind in self.replaced.items() if name not in self.by_peft)
        lines = [f"{count} x {kind}" for kind, count in taken.items()]
        lines = [f"accelerated: {', '.join(lines) or 'no layer'}"]
        repacked = f"{self.repacked_nbytes / 2**20:,.0f}"
        # statistics of a small model's weights are a few KiB
        if repacked != "0":
            lines.append(f"repacked for the kernels: {repacked} MiB")
        lines += [f"lazy hidden states: {n or 'the model'}{self._limit(n)}" for n in self.lazy]
        lines += [
            f"hidden states as before: {n or 'the model'}: {r}" for n, r in self.eager.items()
        ]
        lines += _by_reason("left as they are", self.kept | self.by_peft)
        lines += _by_reason("left as they are in training", self.by_peft_in_training)
        return "\n".join(lines)

    def _limit(self, name: str) -> str:
        if name not in self.limits:
            return ""
        return f", none above hidden_states[{self.limits[name]}] (stop_at, until restored)"


def _by_reason(what: str, layers: dict[str, str]) -> list[str]:
    """A line for each reason, with how many layers have it and the name of the first."""
    first = {reason: name for name, reason in reversed(layers.items())}
    counts = Counter(layers.values())
    return [f"{what}: {count} x: {reason} ({first[reason]} …)" for reason, count in counts.items()]


def _outermost(reasons: dict[str, str]) -> dict[str, str]:
    """Reasons of models, without those of models inside others that stay for the same reason."""
    # in the order of modules an outer one comes first
    found: dict[str, str] = {}
    for name, reason in reasons.items():
        if not any(r == reason and (not n or name.startswith(f"{n}.")) for n, r in found.items()):
            found[name] = reason
    return found


def accelerate(model: Any, *, stop_at: int | None = None) -> Summary:
    """Run a transformers model's layers on the engine, and its blocks only as far as they are read.

    In place, on the same parameters: ``state_dict``, ``save_pretrained``, adapters, ``merge_and_unload``,
    ``generate``, gradient checkpointing and ``torch.compile`` go on working. Called again, it takes
    in what was added since, adapters say, and leaves the rest.

    Args:
        model: A causal LM or a decoder, wrapped by PEFT or not, its weights loaded.
        stop_at: No more than ``hidden_states[stop_at]`` will be read: blocks above keep their
            layers and never run, and reading more, logits included, is an error. None: all, or as far as
            an earlier call said.

    Returns:
        What was replaced, and what was not, and why.

    Raises:
        UserError: Not a model, weights on the meta device, offloaded by hooks, or a ``stop_at`` that is no
            whole number, or one that the model does not have or cannot keep to.
    """
    check_model(model)
    if stop_at is not None and type(stop_at) is not int:
        raise UserError(f"stop_at is the number of a hidden state, such as 2; got {stop_at!r}")
    summary, limits = Summary(), dict[str, int | None]()
    for name, module in model.named_modules():
        make_lazy(name, module, stop_at, limits, summary.eager)
    summary.eager = _outermost(summary.eager)
    summary.lazy = list(limits)
    summary.limits = {name: limit for name, limit in limits.items() if limit is not None}
    if stop_at is not None and not summary.lazy:
        why = (
            "; ".join(dict.fromkeys(summary.eager.values()))
            or "it holds no decoder of transformers"
        )
        raise UserError(f"stop_at={stop_at} needs lazy hidden states, which it cannot have: {why}")
    above = _blocks_above(model)
    for kind in kinds():
        for name, layer in _candidates(model, kind):
            limit = next((k for prefix, k in above.items() if name.startswith(prefix)), None)
            if limit is not None:
                summary.kept[name] = f"above stop_at={limit}"
            else:
                _take(layer, name, kind, summary)
    _note_left(model, summary)
    summary.repacked_nbytes = sum(
        layer.frozen_weight().repacked_nbytes
        for layer in model.modules()
        if original_class(layer) is not None and hasattr(layer, "frozen_weight")
    )
    return summary


def restore(model: Any) -> None:
    """Undo :func:`accelerate`: every module has the class that it had; parameters were never changed.

    Raises:
        UserError: The model is not accelerated.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"restore takes a model, got {type(model).__name__}")
    replaced = [module for module in model.modules() if original_class(module) is not None]
    if not replaced:
        raise UserError("the model is not accelerated; there is nothing to restore")
    for module in replaced:
        put_back(module)


def _candidates(model: nn.Module, kind: Kind) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if issubclass(type(module), kind.theirs):
            yield name, module


def _take(layer: nn.Module, name: str, kind: Kind, summary: Summary) -> None:
    if type(layer) is not kind.ours:
        try:
            replace_layer(layer, kind)
        except NotReplacedError as reason:
            summary.kept[name] = str(reason)
            return
    summary.replaced[name] = kind.name


def _note_left(model: nn.Module, summary: Summary) -> None:
    """Note the layers that the engine has no product for, and adapters that it leaves to PEFT."""
    for name, layer in model.named_modules():
        reason = why_unknown(layer)
        if reason is not None:
            summary.kept[name] = reason
        if name in summary.replaced:
            for reasons, why in (
                (summary.by_peft, why_peft),
                (summary.by_peft_in_training, why_peft_in_training),
            ):
                reason = why(layer)
                if reason is not None:
                    reasons[name] = reason


def _blocks_above(model: nn.Module) -> dict[str, int]:
    """Names of the blocks that lazy models never run, each with a dot, and their model's limit."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        settings, layers = settings_of(module), getattr(module, "layers", None)
        limit = None if settings is None else settings.stop_at
        if limit is not None and isinstance(layers, nn.ModuleList):
            prefix = f"{name}.layers." if name else "layers."
            found |= {f"{prefix}{i}.": limit for i in range(limit, len(layers))}
    return found
