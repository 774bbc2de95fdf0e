"""Lazy hidden states of models that other libraries have changed: wrapped, compiled, offloaded modules."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.conftest import adapt, gradients
from tli_engine import accelerate

Load = Callable[..., Any]


def read(out: Any) -> list[Tensor]:
    return [*out.hidden_states, out.logits]


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for mine, theirs in zip(actual, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    "whole",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "norm"]},
        {"trainable_token_indices": [3, 7]},
    ],
    ids=["head", "embeddings and norm", "tokens"],
)
def test_what_peft_trains_whole(
    load: Load, tokens: dict[str, Tensor], whole: dict[str, Any]
) -> None:
    def make() -> Any:
        model = adapt(load(nf4=False), target_modules=["o_proj"], **whole)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "lora_" not in name:
                    parameter.mul_(1.5)
        return model

    def step(model: Any) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
        with model.disable_adapter(), torch.no_grad():
            bare = model(**tokens, output_hidden_states=True)
        out = model(**tokens, output_hidden_states=True, labels=tokens["input_ids"])
        out.loss.backward()
        # without adapters, as at the call
        return read(out), read(bare), gradients(model)

    expected, bare, grads = step(make())
    model = make()
    accelerate(model)
    actual = step(model)
    for mine, theirs in zip(actual[0] + actual[1], expected + bare, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected[-1], bare[-1])
    assert actual[2].keys() == grads.keys()
