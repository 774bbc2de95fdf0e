"""BLEU, chrF++ and ROUGE with their intervals, against sacreBLEU."""

import json
import random
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from tli_engine import __version__
from tli_engine.errors import UserError
from tli_engine.evaluate import text_metrics
from tli_engine.evaluate.rouge import rouge, split_lines
from tli_engine.evaluate.text_metrics import pool, resample_sums, score_sums, score_texts

SUMMARIES: dict[str, list[dict[str, Any]]] = json.loads(
    Path(__file__).with_name("summaries.json").read_text(encoding="utf-8")
)
EMPTY = [("", "neno moja"), ("neno moja", ""), ("", "")]


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def corpus(count: int, seed: int = 0, length: int = 12) -> tuple[list[str], list[str]]:
    """Predictions that share runs of words with their references, and some that share nothing."""
    generator = random.Random(seed)
    words = [f"neno{i}" for i in range(30)] + ["la", "Ya", "mvua,", "12.5", "Ng'ombe."]
    predictions, references = [], []
    for _ in range(count):
        reference = generator.choices(words, k=generator.randrange(1, 2 * length))
        kept = [w if generator.random() < 0.8 else generator.choice(words) for w in reference]
        predictions.append(" ".join(kept[: generator.randrange(len(kept) + 1)]))
        references.append(" ".join(reference))
    return predictions, references


@pytest.mark.parametrize(
    ("count", "length"), [(1, 2), (1, 12), (2, 12), (5, 2), (9, 3), (40, 12), (40, 2)]
)
@pytest.mark.parametrize("seed", range(4))
def test_bleu_and_chrf_are_sacrebleus(count: int, length: int, seed: int) -> None:
    """Few or short texts have no 4-grams, or none that match."""
    predictions, references = corpus(count, seed, length)
    found = score_texts(predictions, references, resamples=10)
    chrf = CHRF(word_order=2)
    assert found.bleu.score == pytest.approx(BLEU().corpus_score(predictions, [references]).score)
    assert found.chrf.score == pytest.approx(chrf.corpus_score(predictions, [references]).score)
    alone = BLEU(effective_order=True)
    for i, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        sentence = alone.sentence_score(prediction, [reference]).score
        assert found.bleu.per_text[i] == pytest.approx(sentence)
        assert found.chrf.per_text[i] == pytest.approx(
            chrf.sentence_score(prediction, [reference]).score
        )


@pytest.mark.parametrize("language", SUMMARIES)
def test_languages(language: str) -> None:
    predictions = [pair["prediction"] for pair in SUMMARIES[language]]
    references = [pair["reference"] for pair in SUMMARIES[language]]
    found = score_texts(predictions, references, language, resamples=50)
    tokenizer = "zh" if language == "chinese" else "13a"
    bleu = BLEU(tokenize=tokenizer).corpus_score(predictions, [references])
    assert found.bleu.score == pytest.approx(bleu.score)
    assert f"|tok:{tokenizer}|" in found.bleu.signature
    for k, metric in enumerate((found.rouge1, found.rouge2, found.rougeL)):
        expected = [pair["xlsum"][k] for pair in SUMMARIES[language]]
        assert metric.per_text == pytest.approx(expected)
        assert metric.score == pytest.approx(np.mean(expected))
    for score in found:
        assert score.ci95[0] <= score.score <= score.ci95[1]
        assert score.per_text.dtype == np.float64


def test_languages_without_spaces_are_scored_by_characters() -> None:
    texts = (["น้ำท่วมเมือง"], ["น้ำท่วมในเมือง"])
    found = score_texts(*texts, "Thai")
    assert "|tok:char|" in found.bleu.signature
    assert "|tok:xlsum-char|" in found.rouge1.signature
    expected = rouge(split_lines(texts[0][0], True), split_lines(texts[1][0], True))
    assert found.rouge1.score == pytest.approx(100 * expected[0])
    assert found.rouge1.score > 80
    assert score_texts(*texts, "swahili").rouge1.score == 0


def test_signatures_and_report() -> None:
    found = score_texts(["a b c d"], ["a b c d"])
    bleu = BLEU()
    bleu.corpus_score(["a"], [["a"]])
    assert found.bleu.signature == str(bleu.get_signature())
    assert "|nc:6|nw:2|" in found.chrf.signature
    shared = "nrefs:1|case:lc|tok:xlsum|stem:no|f:1|avg:texts"
    assert found.rougeL.signature == f"{shared}|version:tli-engine-{__version__}"
    assert found.rougeLsum.signature == f"{shared}|sent:lines|version:tli-engine-{__version__}"
    report = json.loads(json.dumps(found.report()))
    assert list(report) == ["bleu", "chrf", "rouge1", "rouge2", "rougeL", "rougeLsum"]
    assert all(list(score) == ["score", "ci95", "signature"] for score in report.values())
    assert [score["score"] for score in report.values()] == pytest.approx([100] * 6)


@pytest.mark.parametrize("pair", EMPTY)
def test_empty_texts_score_zero(pair: tuple[str, str]) -> None:
    found = score_texts([pair[0]], [pair[1]])
    assert [(score.score, list(score.per_text)) for score in found] == [(0, [0])] * 6
    among = score_texts([pair[0], "maji safi ya kunywa"], [pair[1], "maji safi ya kunywa"])
    assert among.rouge1.score == pytest.approx(50)
    assert list(among.bleu.per_text) == pytest.approx([0, 100])
    assert all(np.isfinite(score.ci95).all() for score in among)


def test_one_text_has_no_interval() -> None:
    found = score_texts(["maji safi ya kunywa leo"], ["maji safi ya kunywa"])
    assert all(np.isnan(score.ci95).all() for score in found)
    assert found.bleu.score == pytest.approx(found.bleu.per_text[0])


def test_resamples_have_exact_corpus_scores() -> None:
    """Each is scored again by sacreBLEU, as the corpus of the texts that were drawn."""
    predictions, references = corpus(15)
    scores = score_texts(predictions, references)
    drawn = resample_sums(np.eye(15), 20, seed=3)
    assert (drawn.sum(1) == 15).all()
    for metric, score in ((BLEU(), scores.bleu), (CHRF(word_order=2), scores.chrf)):
        sums = resample_sums(score.statistics, 20, seed=3)
        for row, weights in zip(sums, drawn, strict=True):
            texts = np.repeat(np.arange(15), weights.astype(int))
            expected = metric.corpus_score(
                [predictions[i] for i in texts], [[references[i] for i in texts]]
            )
            assert float(score_sums(score.metric, row)) == pytest.approx(expected.score)


def test_intervals_are_those_of_sacrebleu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SACREBLEU_SEED", "1")
    predictions, references = corpus(80)
    found = score_texts(predictions, references)
    for metric, score in ((BLEU(), found.bleu), (CHRF(word_order=2), found.chrf)):
        theirs = metric.corpus_score(predictions, [references], n_bootstrap=2000)
        half = (score.ci95[1] - score.ci95[0]) / 2
        assert half == pytest.approx(theirs._ci, rel=0.1)


def test_resamples_do_not_depend_on_blocks_or_on_other_systems(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    statistics = np.random.default_rng(0).integers(0, 9, (30, 5)).astype(float)
    whole = resample_sums(statistics, 100, seed=7)
    assert np.array_equal(whole[:, 2:], resample_sums(statistics[:, 2:], 100, seed=7))
    assert not np.array_equal(whole, resample_sums(statistics, 100, seed=8))
    monkeypatch.setattr(text_metrics, "BLOCK", 1000)
    assert np.array_equal(whole, resample_sums(statistics, 100, seed=7))


def test_pooled_runs_are_one_corpus() -> None:
    predictions, references = corpus(20)
    others, _ = corpus(20, seed=1)
    runs = [score_texts(p, references) for p in (predictions, others)]
    together = score_texts(predictions + others, references * 2)
    for metric in ("bleu", "chrf", "rouge1", "rougeLsum"):
        pooled = pool([getattr(run, metric) for run in runs])
        assert pooled.score == pytest.approx(getattr(together, metric).score)
        assert pooled.ci95[0] < pooled.score < pooled.ci95[1]
        assert len(pooled.per_text) == 20
    alone = pool([runs[0].bleu])
    assert (alone.score, alone.ci95) == (runs[0].bleu.score, runs[0].bleu.ci95)
    # the same text twice tells no more than once
    twice = pool([runs[0].bleu, runs[0].bleu])
    assert twice.ci95 == pytest.approx(alone.ci95)
    # nor does what neither of them matches, which is smoothed
    rare = score_texts(["a b c d e", "f g h"], ["a b x d e", "f y h"]).bleu
    assert rare.statistics[:, 4:6].sum() == 0
    again = pool([rare, pool([rare, rare])])
    assert (again.score, *again.ci95) == pytest.approx((rare.score, *rare.ci95))
    assert again.runs == 3


def test_a_thousand_texts_take_seconds() -> None:
    predictions, references = corpus(1000, length=25)
    start = time.perf_counter()
    score_texts(predictions, references)
    assert time.perf_counter() - start < 20


def test_messages() -> None:
    with pytest.raises(UserError, match="2 predictions for 1 references"):
        score_texts(["a", "b"], ["a"])
    with pytest.raises(UserError, match="no texts to score"):
        score_texts([], [])
