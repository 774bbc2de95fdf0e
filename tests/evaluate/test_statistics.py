"""Paired tests and the bootstrap, held against scipy and against what they must say."""

import math
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from tli_engine.evaluate import statistics
from tli_engine.evaluate.statistics import bootstrap_ci95, paired_tests

Array = NDArray[np.float64]


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    """What scipy warns of would be printed amid the user's results."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def sample(count: int, shift: float = 0.3, seed: int = 0) -> tuple[Array, Array]:
    generator = np.random.default_rng(seed)
    before = generator.normal(size=count)
    return before, before + shift + generator.normal(size=count)


@pytest.mark.parametrize("count", [2, 3, 10, 60, 623])
def test_figures_are_scipys(count: int) -> None:
    before, after = sample(count)
    difference = after - before
    found = paired_tests(before, after)
    assert found["t_p"] == pytest.approx(stats.ttest_1samp(difference, 0).pvalue, rel=1e-9)
    assert found["wilcoxon_p"] == pytest.approx(stats.wilcoxon(difference).pvalue, rel=1e-9)
    effect = np.mean(difference) / np.std(difference, ddof=1)
    assert found["effect_size"] == pytest.approx(effect, rel=1e-12)
    assert found["ci95"] == bootstrap_ci95(difference)
    low, high = found["ci95"]  # type: ignore[misc]
    assert low <= difference.mean() <= high
    assert all(type(found[key]) is float for key in ("t_p", "wilcoxon_p", "effect_size"))


def test_known_figures() -> None:
    """Student's sleep data (1908), whose paired t-test is in the textbooks: t = 4.0621."""
    before = np.array([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0])
    after = np.array([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])
    found = paired_tests(before, after)
    assert found["t_p"] == pytest.approx(0.002833, abs=1e-6)
    assert found["effect_size"] == pytest.approx(4.0621 / math.sqrt(10), abs=1e-4)
    assert found["wilcoxon_p"] == pytest.approx(0.009091, abs=6e-3)


def test_the_other_way_round_has_the_other_sign() -> None:
    before, after = sample(40)
    there, back = paired_tests(before, after), paired_tests(after, before)
    assert there["t_p"] == pytest.approx(back["t_p"])
    assert there["wilcoxon_p"] == pytest.approx(back["wilcoxon_p"])
    assert there["effect_size"] == pytest.approx(-back["effect_size"])  # type: ignore[operator]
    assert there["effect_size"] > 0  # type: ignore[operator]
    assert there["ci95"] == pytest.approx([-x for x in reversed(back["ci95"])])  # type: ignore[call-overload]


def test_noise_is_not_called_a_change() -> None:
    """With nothing to find, p-values are uniform: about one in twenty is under 0.05."""
    found = []
    for seed in range(200):
        before, after = sample(30, shift=0, seed=seed)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(statistics, "_DRAWS", 10)
            found.append(paired_tests(before, after))
    for key in ("t_p", "wilcoxon_p"):
        share = np.mean([f[key] < 0.05 for f in found])  # type: ignore[operator]
        # 10 are expected of 200; 22 or more in one of 2000 such tests
        assert 0.005 <= share < 0.11, key


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_pairs_say_nothing(count: int) -> None:
    found = paired_tests(np.zeros(count), np.ones(count))
    assert all(math.isnan(found[key]) for key in ("t_p", "wilcoxon_p", "effect_size"))  # type: ignore[arg-type]
    assert all(math.isnan(x) for x in found["ci95"])  # type: ignore[attr-defined]


def test_no_difference_at_all() -> None:
    values = np.linspace(0, 1, 9)
    found = paired_tests(values, values.copy())
    assert all(math.isnan(found[key]) for key in ("t_p", "wilcoxon_p", "effect_size"))  # type: ignore[arg-type]
    assert found["ci95"] == [0.0, 0.0]


@pytest.mark.parametrize("step", [1.0, 0.1], ids=["exact", "rounded"])
def test_the_same_difference_in_every_pair(step: float) -> None:
    """Without spread there is no effect size, even where rounding leaves some."""
    before = np.linspace(0, 1, 9) if step != 1 else np.arange(9.0)
    found = paired_tests(before, before + step)
    assert math.isnan(found["effect_size"])  # type: ignore[arg-type]
    assert found["ci95"] == pytest.approx([step, step])
    assert found["wilcoxon_p"] == pytest.approx(2 / 2**9)


def test_pairs_that_do_not_change_among_those_that_do() -> None:
    before = np.zeros(12)
    after = np.array([0.0] * 7 + [0.5, 1.0, -0.25, 0.5, 0.125])
    found = paired_tests(before, after)
    assert 0 < found["t_p"] < 1  # type: ignore[operator]
    assert 0 < found["wilcoxon_p"] <= 1  # type: ignore[operator]
    only_one = paired_tests(np.zeros(5), np.array([0.0, 0.0, 1.0, 0.0, 0.0]))
    assert only_one["wilcoxon_p"] == pytest.approx(1)


def test_interval_is_that_of_scipys_bootstrap() -> None:
    values = np.random.default_rng(3).exponential(size=80)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=5000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    spread = values.std() / math.sqrt(len(values))
    assert bootstrap_ci95(values) == pytest.approx(list(expected), abs=0.1 * spread)


def test_interval_holds_the_mean_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_DRAWS", 400)
    generator = np.random.default_rng(0)
    held = []
    for _ in range(150):
        low, high = bootstrap_ci95(generator.normal(loc=2, size=40))
        held.append(low <= 2 <= high)
    # 95 % less a little, as percentile intervals of 40 values are; ± 3 standard errors
    assert 0.87 <= np.mean(held) <= 0.99


def test_interval_narrows_with_the_root_of_the_count() -> None:
    generator = np.random.default_rng(0)
    few, many = (np.diff(bootstrap_ci95(generator.normal(size=n)))[0] for n in (50, 800))
    assert 3 < few / many < 5.5


def test_interval_is_repeatable_and_leaves_the_random_state_alone() -> None:
    values = np.random.default_rng(0).normal(size=30)
    state = np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    assert bootstrap_ci95(values) == bootstrap_ci95(values)
    assert bootstrap_ci95(values) != bootstrap_ci95(values, seed=1)
    assert np.array_equal(np.random.get_state()[1], state)  # type: ignore[index]


def test_interval_of_equal_values_is_that_value() -> None:
    assert bootstrap_ci95(np.full(5, 0.25)) == [0.25, 0.25]
    assert bootstrap_ci95(np.array([3.0])) == [3.0, 3.0]
