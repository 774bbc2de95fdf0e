"""Paired tests of systems against scipy's, sacreBLEU's and all swaps there are."""

import itertools
import math
import random

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.significance import PairedTest
from scipy import stats

from tli_engine.errors import UserError
from tli_engine.evaluate import significance
from tli_engine.evaluate.significance import approximate_randomization, holm, paired_bootstrap
from tli_engine.evaluate.text_metrics import Score, TextScores, pool, score_sums, score_texts

WORDS = [f"neno{i}" for i in range(40)]


def references(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randrange(4, 15))) for _ in range(count)]


def system(expected: list[str], kept: float, seed: int) -> list[str]:
    """The references with some words replaced."""
    generator = random.Random(seed)
    return [
        " ".join(w if generator.random() < kept else generator.choice(WORDS) for w in text.split())
        for text in expected
    ]


def two_systems(
    count: int, kept: tuple[float, float], seed: int = 0, resamples: int = 10
) -> tuple[TextScores, TextScores]:
    expected = references(count, seed)
    first, second = (
        score_texts(system(expected, k, seed + i), expected, resamples=resamples)
        for i, k in ((1, kept[0]), (2, kept[1]))
    )
    return first, second


@pytest.mark.parametrize("metric", ["bleu", "chrf", "rouge2"])
def test_randomisation_is_that_of_all_swaps(metric: str) -> None:
    first, second = (getattr(s, metric) for s in two_systems(8, (0.9, 0.7)))
    observed = abs(first.score - second.score)
    far = 0
    for swaps in itertools.product((False, True), repeat=8):
        swap = np.array(swaps)[:, None]
        pair = [
            score_sums(first.metric, np.where(swap, a, b).sum(0))
            for a, b in (
                (first.statistics, second.statistics),
                (second.statistics, first.statistics),
            )
        ]
        far += abs(float(pair[0] - pair[1])) >= observed - 1e-9
    assert approximate_randomization(first, second) == pytest.approx(far / 2**8, abs=0.015)


def test_mean_scores_are_tested_as_scipy_does() -> None:
    first, second = (s.rouge1 for s in two_systems(60, (0.8, 0.75)))
    difference = first.per_text - second.per_text
    expected = stats.permutation_test(
        (difference,), np.mean, permutation_type="samples", rng=np.random.default_rng(1)
    )
    assert approximate_randomization(first, second) == pytest.approx(expected.pvalue, abs=0.02)
    found = paired_bootstrap(first, second)
    interval = stats.bootstrap(
        (difference,), np.mean, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert found.difference == pytest.approx(difference.mean())
    assert found.ci95 == pytest.approx(list(interval), abs=0.1 * stats.sem(difference))
    # of a mean, close to Student's
    assert found.p == pytest.approx(stats.ttest_1samp(difference, 0).pvalue, abs=0.02)


@pytest.mark.parametrize("kind", ["ar", "bs"])
def test_bleu_is_tested_as_sacrebleu_does(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SACREBLEU_SEED", "1")
    expected = references(60)
    texts = {"a": system(expected, 0.75, 1), "b": system(expected, 0.8, 2)}
    theirs = PairedTest(
        list(texts.items()), {"BLEU": BLEU()}, [expected], test_type=kind, n_samples=2000
    )()[1]["BLEU"][1].p_value
    scores = {name: score_texts(t, expected, resamples=10).bleu for name, t in texts.items()}
    ours = (
        approximate_randomization(scores["b"], scores["a"])
        if kind == "ar"
        else paired_bootstrap(scores["b"], scores["a"]).p
    )
    assert 0.01 < ours < 0.9
    assert ours == pytest.approx(theirs, abs=0.04)


def test_equal_systems_do_not_differ() -> None:
    for score in two_systems(20, (0.8, 0.8))[0]:
        assert paired_bootstrap(score, score) == (0, (0, 0), 1)
        assert approximate_randomization(score, score) == 1


def test_a_clear_difference_either_way_round() -> None:
    for first, second in zip(*two_systems(80, (0.9, 0.4)), strict=True):
        there, back = paired_bootstrap(first, second), paired_bootstrap(second, first)
        assert there.difference == pytest.approx(-back.difference)
        assert there.difference > 10
        assert 0 < there.ci95[0] < there.difference < there.ci95[1]
        assert there.ci95 == pytest.approx([-x for x in reversed(back.ci95)])
        assert there.p == pytest.approx(back.p) == pytest.approx(1 / 10_001)
        assert approximate_randomization(first, second) == pytest.approx(1 / 10_001)


def test_noise_is_not_called_a_difference() -> None:
    """Of systems that are equally good, about one pair in twenty has p under 0.05."""
    found = []
    for seed in range(120):
        first, second = (s.bleu for s in two_systems(25, (0.8, 0.8), seed=10 * seed, resamples=1))
        p = paired_bootstrap(first, second, resamples=300).p
        found.append((p, approximate_randomization(first, second, trials=300)))
    # 6 are expected of 120; over 15 in one of 2000 such tests
    shares = np.mean(np.array(found) < 0.05, axis=0)
    assert (shares <= 0.125).all()
    assert (shares > 0).all()
    assert np.mean([p for _, p in found]) == pytest.approx(0.5, abs=0.1)


def test_results_are_repeatable_in_any_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (s.bleu for s in two_systems(30, (0.8, 0.75)))
    whole = approximate_randomization(first, second, trials=500)
    assert whole != approximate_randomization(first, second, trials=500, seed=1)
    assert paired_bootstrap(first, second) == paired_bootstrap(first, second)
    monkeypatch.setattr(significance, "BLOCK", 600)
    assert approximate_randomization(first, second, trials=500) == whole


def test_one_text_tells_nothing() -> None:
    first, second = (s.rouge1 for s in two_systems(1, (0.9, 0.1)))
    found = paired_bootstrap(first, second)
    assert found.difference == first.score - second.score
    assert math.isnan(found.p)
    assert all(math.isnan(x) for x in found.ci95)
    assert math.isnan(approximate_randomization(first, second))


def test_messages() -> None:
    scores = score_texts(["neno moja"] * 2, ["neno moja"] * 2)
    fewer: Score = score_texts(["neno moja"], ["neno moja"]).bleu
    for test in (paired_bootstrap, approximate_randomization):
        with pytest.raises(UserError, match="bleu of 2 texts and of 1; only systems on the same"):
            test(scores.bleu, fewer)  # type: ignore[operator]
        if test is approximate_randomization:
            with pytest.raises(UserError, match="bleu of 2 runs and of 1: their texts cannot be"):
                test(pool([scores.bleu] * 2), scores.bleu)
        with pytest.raises(UserError, match=r"scored differently: rouge1 .* and rougeLsum"):
            test(scores.rouge1, scores.rougeLsum)  # type: ignore[operator]


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []
    with_nan = holm([0.01, float("nan"), 0.04])
    assert with_nan[::2] == pytest.approx([0.02, 0.04])
    assert math.isnan(with_nan[1])
