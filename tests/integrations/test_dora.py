"""DoRA, whose forward is PEFT's: on a CPU it exchanges the 4-bit parameters that it dequantises."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.conftest import adapt, assert_close, gradients
from tli_engine import accelerate
from tli_engine.errors import UserError
from tli_engine.integrations.weight_writes import watched

Load = Callable[..., Any]


def dora(load: Load, nf4: bool = True) -> Any:
    return adapt(load(nf4=nf4), use_dora=True)


@pytest.mark.parametrize("nf4", [True, False])
def test_hidden_states_are_read_one_by_one(
    load: Load, tokens: dict[str, Tensor], nf4: bool
) -> None:
    found = []
    for accelerated in (False, True):
        model = dora(load, nf4)
        if accelerated:
            accelerate(model)
        out = model(**tokens, output_hidden_states=True)
        states = [out.hidden_states[k] for k in range(5)]
        sum(state.square().mean() for state in states).backward()
        found.append((states, out.logits, gradients(model)))
    assert_close(found[1], found[0])


@torch.no_grad()
def test_a_changed_weight_is_still_one(load: Load, tokens: dict[str, Tensor]) -> None:
    model = dora(load).eval()
    accelerate(model)
    projection = model.get_base_model().model.layers[1].self_attn.q_proj.base_layer

    def write() -> None:
        projection.weight.zero_()

    def exchange() -> None:
        projection.weight.data = projection.weight.data.clone()

    for change in (write, exchange):
        with watched():
            out = model(**tokens, output_hidden_states=True)
            out.hidden_states[2]
            change()
            with pytest.raises(UserError, match="before the model's weights changed"):
                out.hidden_states[3]
