"""Greedy continuations are transformers' own, text by text, whatever else is in the batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tli_engine.models.causal import CausalModel
from tli_engine.models.files import FAMILIES
from tli_engine.models.generate import Generated, GenerateOptions, generate

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# past the window of 24 tokens from the start, at it, on the way past it, one token
LENGTHS = (40, 24, 7, 1, 13)
NEW = 24
MODELS = [
    *(pytest.param(family, {}, id=family) for family in FAMILIES),
    pytest.param("llama", {"tie_word_embeddings": True}, id="llama-tied"),
    pytest.param("gemma3_text", {"final_logit_softcapping": 5.0}, id="gemma3-softcap"),
    pytest.param(
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2},
        id="qwen2-windows",
    ),
]
Load = Callable[..., CausalModel]


def some_prompts(*lengths: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(3)
    return [tuple(torch.randint(0, 256, (n,), generator=generator).tolist()) for n in lengths]


def by_transformers(theirs: Any, prompts: list[tuple[int, ...]], end: int, **how: Any) -> Any:
    """Each prompt alone, cut before the end."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": end, **how}
        mask = torch.ones_like(ids)
        out = theirs.generate(ids, attention_mask=mask, pad_token_id=258, **options)
        tokens = out[0, len(prompt) :].tolist()
        found.append(tuple(tokens[: tokens.index(end)] if end in tokens else tokens))
    return found


def tokens_of(found: list[Generated]) -> list[tuple[int, ...]]:
    return [text.tokens for text in found]


def an_end(texts: list[tuple[int, ...]]) -> int:
    """A token that some text comes to, early, and another does not."""
    return next(t for t in texts[0][3:] if not all(t in text for text in texts))


@pytest.mark.parametrize("fused", [False, True], ids=["modules", "fused"])
@pytest.mark.parametrize(("family", "overrides"), MODELS)
def test_greedy_tokens_are_those_of_transformers(
    family: str, overrides: Any, fused: bool, causal: Load, full: Any
) -> None:
    model, theirs = causal(family, **overrides), full(family, **overrides)
    if fused:
        model.fuse()
    prompts = some_prompts(*LENGTHS)
    free = by_transformers(theirs, prompts, 257)
    end = an_end(free)
    expected = by_transformers(theirs, prompts, end)
    assert len(expected[0]) < NEW
    found = generate(model, prompts, GenerateOptions(NEW, end, batch_size=3))
    assert tokens_of(found) == expected
    assert [text.ended for text in found] == [len(text) < NEW for text in expected]
