"""Continuations by real weights are transformers' own."""

from typing import Any

import pytest
import torch
from torch import nn

from tli_engine.models.causal import load_causal
from tli_engine.models.generate import GenerateOptions, generate

TEXTS = ["Habari za asubuhi", "The capital of Kenya is", "Rais alisema kwamba serikali itaongeza"]


@pytest.mark.parametrize("beams", [1, 2])
def test_tokens_are_those_of_transformers(smollm2: Any, full_model: nn.Module, beams: int) -> None:
    """By transformers' modules, and by the engine's."""
    model = load_causal(smollm2, dtype=torch.float32, device=torch.device("cpu"))
    prompts = [tuple(smollm2.tokenizer(text)["input_ids"]) for text in TEXTS]
    end = smollm2.tokenizer.eos_token_id
    theirs: Any = full_model
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            eos_token_id=end,
            pad_token_id=end,
            repetition_penalty=1.0,
            max_new_tokens=12,
            do_sample=False,
            num_beams=beams,
        )
        tokens = out[0, len(prompt) :].tolist()
        expected.append(tuple(tokens[: tokens.index(end)] if end in tokens else tokens))
    options = GenerateOptions(12, (end,), beams=beams)
    assert [text.tokens for text in generate(model, prompts, options)] == expected
    model.fuse()
    assert [text.tokens for text in generate(model, prompts, options)] == expected
