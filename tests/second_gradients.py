"""Gradients of gradients of a model with adapters, by PEFT's layers and by the engine's."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tli_engine import accelerate


def second_gradients(load: Callable[[], Any], tokens: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Gradients of a penalty on the first block's, by the model as it is loaded and accelerated.

    Args:
        load: Loads a model with PEFT's adapters, in training, the same each time.
        tokens: What it is called with.

    Returns:
        Of both, the gradients of the parameters that have one, by name.
    """
    found = []
    for accelerated in (False, True):
        model = load()
        # PyTorch's has none on a CPU, nor in its fused kernels
        model.get_base_model().set_attn_implementation("eager")
        if accelerated:
            accelerate(model)
        own = [p for n, p in model.named_parameters() if p.requires_grad and "layers.0" in n]
        loss = model(**tokens, output_hidden_states=True).hidden_states[2].square().mean()
        first = torch.autograd.grad(loss, own, create_graph=True)
        torch.stack([g.square().sum() for g in first]).sum().backward()
        assert all(p.grad is not None for p in own)
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    return found
