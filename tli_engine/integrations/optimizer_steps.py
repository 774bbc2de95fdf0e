"""Lets version counters show the steps of optimizers that write through pointers, as bitsandbytes' do.

Of models whose hidden states are lazy: what is read after such a step is then refused as after any other.
"""

import weakref
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from tli_engine.integrations.same_objects import versions


class Holder(Protocol):
    """A model's modules."""

    def parameters(self) -> list[Tensor | None]:
        """Every parameter there is now."""


# by their numbers, as long as something is, or may be, read of them
_models: dict[int, "weakref.ref[Holder]"] = {}
_hooks: list[RemovableHandle] = []
# of optimizers that are in a step
_before: "weakref.WeakKeyDictionary[Optimizer, list[int]]" = weakref.WeakKeyDictionary()


def note_steps_on(model: Holder) -> None:
    """Count the writes of all optimizers to a model's parameters until it is given up."""
    _models[id(model)] = weakref.ref(model, partial(_forget, id(model)))
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_begin))
        _hooks.append(register_optimizer_step_post_hook(_end))


def _forget(number: int, _: object) -> None:
    _models.pop(number, None)
    if not _models:
        while _hooks:
            _hooks.pop().remove()


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _begin(optimizer: Optimizer, *_: Any) -> None:
    # a compiled step writes by operations that count
    if not torch.compiler.is_compiling():
        _before[optimizer] = versions(_parameters(optimizer))


def _end(optimizer: Optimizer, *_: Any) -> None:
    if torch.compiler.is_compiling():
        return
    before, parameters = _before.pop(optimizer, []), _parameters(optimizer)
    now = versions(parameters)
    if len(before) != len(now):
        # groups were exchanged by the step
        return
    same = zip(parameters, before, now, strict=True)
    silent = [p for p, was, is_ in same if was == is_ != -1 and p.grad is not None]
    if not silent:
        return
    models = [ref() for ref in [*_models.values()]]
    ours = {id(p) for model in models if model is not None for p in model.parameters()}
    for parameter in silent:
        if id(parameter) in ours:
            torch.autograd.graph.increment_version(parameter)
