"""Drift between logits, and logits of whole models made block by block, held against transformers."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tli_engine.errors import UserError
from tli_engine.evaluate.logit_drift import SAMPLE, measure_drift, sample_words
from tli_engine.models.blockwise import Held, logits_of
from tli_engine.models.files import FAMILIES, open_model
from tli_engine.models.merged import MergedSource, write_model, write_nf4
from tli_engine.models.peft_format import StoredAdapter
from tli_engine.testing import save_tiny_model

MODELS = [*((f, {}) for f in FAMILIES), ("gemma3_text", {"final_logit_softcapping": 5.0})]


def theirs(folder: Path, ids: list[tuple[int, ...]]) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return torch.cat([model(torch.tensor([i])).logits[0] for i in ids])


def test_figures_of_logits_known_by_hand() -> None:
    # of two tokens, one moved: (1/2, 1/2) became (1/4, 3/4)
    expected = torch.zeros(2, 2)
    actual = torch.tensor([[0.0, 0.0], [0.0, math.log(3.0)]])
    drift = measure_drift(expected, actual)
    assert drift.max == pytest.approx(math.log(3))
    assert drift.mean == pytest.approx(math.log(3) / 4)
    assert drift.kl == pytest.approx((math.log(2) - 0.5 * math.log(3)) / 2)
    assert drift.tokens == 2
    assert str(drift) == "logit drift: max 1.1, mean 0.275, KL 0.0719 nats"


def test_equal_logits_do_not_drift() -> None:
    logits = 30 * torch.randn(70, 11)
    drift = measure_drift(logits, logits.clone())
    assert (drift.max, drift.mean, drift.kl) == (0.0, 0.0, 0.0)


def test_more_tokens_than_are_compared_at_a_time() -> None:
    expected, actual = torch.randn(70, 11), torch.randn(70, 11)
    drift = measure_drift(expected, actual)
    p, q = (logits.double().log_softmax(-1) for logits in (expected, actual))
    difference = (expected.double() - actual.double()).abs()
    assert drift.max == pytest.approx(difference.max().item())
    assert drift.mean == pytest.approx(difference.mean().item())
    assert drift.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item())


@pytest.mark.parametrize(("family", "overrides"), MODELS)
def test_logits_are_transformers_own(
    family: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    files = open_model(str(save_tiny_model(tmp_path, family, **overrides)))
    words = sample_words(files)
    done: list[int] = []
    actual = logits_of(files, words, advance=done.append)
    expected = theirs(tmp_path, [w.input_ids for w in words])
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert sum(done) == 4


@pytest.mark.parametrize("double_quant", [False, True])
def test_weights_take_the_values_that_a_run_holds(double_quant: bool, tmp_path: Path) -> None:
    files = open_model(str(save_tiny_model(tmp_path / "base", "qwen2")))
    write_model(files, MergedSource(files).read, tmp_path / "bf16", torch.bfloat16)
    rounded = open_model(str(tmp_path / "bf16"))
    (tmp_path / "nf4").mkdir()
    write_nf4(rounded, MergedSource(rounded), tmp_path / "nf4", double_quant=double_quant)
    words = sample_words(files)
    held = {
        "bf16": Held(torch.bfloat16),
        "nf4": Held(torch.bfloat16, "nf4", double_quant),
    }
    found = {name: logits_of(files, words, held=of_run) for name, of_run in held.items()}
    for name, logits in found.items():
        torch.testing.assert_close(logits, logits_of(open_model(str(tmp_path / name)), words))
    dense = logits_of(files, words)
    assert 0 < (found["bf16"] - dense).abs().max() < (found["nf4"] - dense).abs().max()


def test_an_adapter_at_a_strength_is_the_merged_one(tmp_path: Path) -> None:
    files = open_model(str(save_tiny_model(tmp_path / "base", "gemma3_text")))
    tensors = {
        f"layers.{b}.self_attn.q_proj": (0.2 * torch.randn(4, 32), 0.2 * torch.randn(64, 4))
        for b in (0, 3)
    }
    adapter = StoredAdapter(4, 8.0, True, tensors)
    write_model(files, MergedSource(files, adapter, 0.5).read, tmp_path / "merged")
    words = sample_words(files)
    expected = theirs(tmp_path / "merged", [w.input_ids for w in words])
    actual = logits_of(files, words, adapter, 0.5)
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    base = logits_of(files, words)
    assert (actual - base).abs().max() > 1e-2 * expected.abs().max()


def test_sentences_are_cut_to_the_attention_window(tmp_path: Path) -> None:
    files = open_model(str(save_tiny_model(tmp_path, "mistral", sliding_window=24)))
    words = sample_words(files)
    assert len(words) == len(SAMPLE) == 16
    assert {len(w) for w in words} == {24}


def test_a_missing_head_is_named(tmp_path: Path) -> None:
    from transformers import AutoModel

    whole = save_tiny_model(tmp_path / "whole", "llama")
    AutoModel.from_pretrained(whole).save_pretrained(tmp_path / "bare")
    files, bare = open_model(str(whole)), open_model(str(tmp_path / "bare"))
    with pytest.raises(UserError, match=r"bare: has no tensor lm_head\.weight"):
        logits_of(bare, sample_words(files))
