"""Greedy continuations are transformers' own, text by text, whatever else is in the batch."""

from collections.abc import Callable
from itertools import takewhile
from typing import Any

import pytest
import torch

from tli_engine.config import LoraConfig
from tli_engine.models import decoder
from tli_engine.models.adapters import adapters, adapters_off, add_lora
from tli_engine.models.causal import CausalModel, load_causal
from tli_engine.models.files import FAMILIES
from tli_engine.models.generate import Generated, GenerateOptions, choose, generate
from tli_engine.nn import NF4Linear

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
    pytest.param(
        "llama",
        {
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        },
        id="llama-dynamic",
    ),
]
Load = Callable[..., CausalModel]


def some_prompts(*lengths: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(3)
    return [tuple(torch.randint(0, 256, (n,), generator=generator).tolist()) for n in lengths]


def by_transformers(theirs: Any, prompts: list[tuple[int, ...]], *ends: int, **how: Any) -> Any:
    """Each prompt alone, cut before the first end."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": list(ends), **how}
        mask = torch.ones_like(ids)
        out = theirs.generate(ids, attention_mask=mask, pad_token_id=258, **options)
        tokens = out[0, len(prompt) :].tolist()
        found.append(tuple(takewhile(lambda token: token not in ends, tokens)))
    return found


def tokens_of(found: list[Generated]) -> list[tuple[int, ...]]:
    return [text.tokens for text in found]


def an_end(texts: list[tuple[int, ...]]) -> int:
    """A token that some text comes to, early, and another does not."""
    return next(t for t in texts[0][3:] if not all(t in text for text in texts))


@pytest.mark.parametrize(("family", "overrides"), MODELS)
def test_greedy_tokens_are_those_of_transformers(
    family: str, overrides: Any, causal: Load, full: Any
) -> None:
    """By transformers' modules, and by the engine's."""
    model, theirs = causal(family, **overrides), full(family, **overrides)
    prompts = some_prompts(*LENGTHS)
    free = by_transformers(theirs, prompts, 257)
    end = an_end(free)
    # one of two ends is the first text's, the other one another's
    one = by_transformers(theirs, prompts, end)
    other = next(t for text in one[1:] for t in text[3:] if t not in one[0])
    expected = by_transformers(theirs, prompts, end, other)
    assert len(expected[0]) == len(one[0]) < NEW
    assert expected != one
    for fused in (False, True):
        if fused:
            model.fuse()
        options = GenerateOptions(NEW, (end, other), batch_size=3)
        found = generate(model, prompts, options)
        assert tokens_of(found) == expected
        assert [text.ended for text in found] == [len(text) < NEW for text in expected]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_beams_are_those_of_transformers(family: str, causal: Load, full: Any) -> None:
    model, theirs = causal(family), full(family)
    prompts = some_prompts(*LENGTHS)
    free = by_transformers(theirs, prompts, 257, num_beams=3)
    ends = [an_end(free), *{text[5] for text in free[1:]}]
    expected = by_transformers(theirs, prompts, *ends, num_beams=3)
    assert len({len(text) for text in expected}) > 1
    assert expected != by_transformers(theirs, prompts, ends[0], num_beams=3)
    how: Any = {"batch_size": 2, "beams": 3}
    for fused in (False, True):
        if fused:
            model.fuse()
        found = generate(model, prompts, GenerateOptions(NEW, tuple(ends), **how))
        assert tokens_of(found) == expected
    # of so many ends the likeliest tokens of all beams may be some
    ends = [token for token in range(256) if token % 4]
    found = generate(model, prompts, GenerateOptions(NEW, tuple(ends), **how))
    assert tokens_of(found) == by_transformers(theirs, prompts, *ends, num_beams=3)


@pytest.mark.parametrize("fused", [False, True], ids=["modules", "fused"])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_adapters_take_part_while_they_are_on(
    quantize: Any, fused: bool, tiny: Any, full: Any
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    device = torch.device("cpu")
    files = tiny("llama", **sizes)
    model = load_causal(files, dtype=torch.float32, device=device, quantize=quantize)
    add_lora(model.early, LoraConfig(layers="0-2", modules=ALL, r=4, dropout=0.5), 4, seed=0)
    base, adapted = full("llama", **sizes), full("llama", **sizes)
    with torch.no_grad():
        for name, module in model.early.decoder.named_modules():
            if isinstance(module, NF4Linear):
                for theirs in (base, adapted):
                    weight = theirs.model.get_submodule(name.removesuffix(".base_layer")).weight
                    weight.copy_(module.weight.dequantize(torch.float32))
        for name, adapter in adapters(model.early).items():
            adapter.lora_B.weight.normal_(0, 0.1)
            update = adapter.scaling * adapter.lora_B.weight @ adapter.lora_A.weight
            adapted.model.get_submodule(name).weight.add_(update)
    if fused:
        model.fuse()
    model.train()
    prompts, options = some_prompts(*LENGTHS), GenerateOptions(NEW, (257,), batch_size=3)
    expected = [by_transformers(theirs, prompts, 257) for theirs in (adapted, base)]
    assert expected[0] != expected[1]
    assert tokens_of(generate(model, prompts, options)) == expected[0]
    with adapters_off(model.early):
        assert tokens_of(generate(model, prompts, options)) == expected[1]
    # dropout took no part, and is on again
    assert model.training


@pytest.mark.parametrize("how", [{}, {"beams": 2}], ids=["greedy", "beams"])
def test_the_score_is_the_sum_of_log_probabilities(how: Any, causal: Load, full: Any) -> None:
    model, theirs = causal("qwen3"), full("qwen3")
    prompts = some_prompts(9, 5)
    end = an_end(tokens_of(generate(model, prompts, GenerateOptions(NEW, (257,), **how))))
    found = generate(model, prompts, GenerateOptions(NEW, (end,), **how))
    assert {text.ended for text in found} == {True, False}
    for prompt, text in zip(prompts, found, strict=True):
        tokens = (*text.tokens, end) if text.ended else text.tokens
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).sum()
        assert text.score == pytest.approx(wanted.item(), rel=1e-4)


def test_a_text_is_sampled_alike_in_any_batch(causal: Load) -> None:
    model, prompts = causal("llama"), some_prompts(*LENGTHS)
    texts = []
    for size, seed in ((1, 0), (4, 0), (4, 1)):
        options = GenerateOptions(NEW, (257,), size, temperature=1.0, top_p=0.9, seed=seed)
        texts.append(tokens_of(generate(model, prompts, options)))
    assert texts[0] == texts[1] != texts[2]


def test_tokens_are_drawn_by_their_probabilities() -> None:
    p = torch.tensor([0.2, 0.5, 0.05, 0.25])
    draws = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    rows = p.log().expand(1000, -1)

    def shares(temperature: float, top_p: float) -> list[float]:
        return (choose(rows, temperature, top_p, draws).bincount(minlength=4) / 1000).tolist()

    assert shares(1.0, 1.0) == pytest.approx([0.2, 0.5, 0.05, 0.25], abs=2e-3)
    # 0.5 + 0.25 is not enough
    assert shares(1.0, 0.8) == pytest.approx([0.2 / 0.95, 0.5 / 0.95, 0, 0.25 / 0.95], abs=2e-3)
    squares = p.square() / p.square().sum()
    assert shares(0.5, 1.0) == pytest.approx(squares.tolist(), abs=2e-3)
    assert shares(1.0, 1e-6) == shares(0.0, 1.0) == shares(1e-300, 1.0) == [0, 1, 0, 0]
    assert shares(float("inf"), 1.0) == pytest.approx([0.25] * 4, abs=2e-3)


def test_prompts_are_run_in_parts(causal: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = causal("mistral"), some_prompts(*LENGTHS)
    options = GenerateOptions(8, (257,), beams=2)
    whole = generate(model, prompts, options)
    monkeypatch.setattr(decoder, "_PREFILL_TOKENS", 32)
    parts = generate(model, prompts, options)
    assert tokens_of(parts) == tokens_of(whole)


def test_speed_is_told_after_each_batch(causal: Load) -> None:
    told: list[tuple[int, str]] = []
    prompts = some_prompts(5, 6, 7)
    options = GenerateOptions(2, (257,), batch_size=2)
    generate(causal("llama"), prompts, options, lambda n, note: told.append((n, note)))
    assert [n for n, _ in told] == [2, 1]
    assert all(note.endswith(" tokens/s") for _, note in told)
    assert generate(causal("llama"), [], options) == []


def test_wrong_options_are_named(causal: Load) -> None:
    with pytest.raises(ValueError, match="eos_token_ids must name a token at least"):
        GenerateOptions(8, ())
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        GenerateOptions(8, (257,), batch_size=0)
    with pytest.raises(ValueError, match=r"temperature must be 0 or more, got -1"):
        GenerateOptions(8, (257,), temperature=-1.0)
    with pytest.raises(ValueError, match=r"temperature must be 0 or more, got nan"):
        GenerateOptions(8, (257,), temperature=float("nan"))
    with pytest.raises(ValueError, match=r"top_p must be above 0, 1 at most, got 1\.5"):
        GenerateOptions(8, (257,), top_p=1.5)
    with pytest.raises(ValueError, match="beams and temperature exclude each other"):
        GenerateOptions(8, (257,), beams=2, temperature=1.0)
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        generate(causal("llama"), [(1,), ()], GenerateOptions(8, (257,)))
