"""Paired tests of a before/after difference."""

import warnings

import numpy as np
from numpy.typing import NDArray
from scipy import stats

_DRAWS = 5000


def paired_tests(before: NDArray[np.float64], after: NDArray[np.float64]) -> dict[str, object]:
    """Test whether the paired values changed.

    Args:
        before: One value a pair.
        after: The same pairs' values.

    Returns:
        ``t_p`` and ``wilcoxon_p``, two-sided p-values of the paired t and Wilcoxon signed-rank
        tests; ``effect_size``, Cohen's d_z, the mean difference over its standard deviation;
        ``ci95``, the bootstrap percentile interval of the mean difference. NaN where fewer than
        two pairs, or no difference at all, leave a figure undefined.
    """
    difference = after - before
    nan = float("nan")
    if len(difference) < 2 or not difference.any():
        ci = [0.0, 0.0] if len(difference) >= 2 else [nan, nan]
        return {"t_p": nan, "wilcoxon_p": nan, "effect_size": nan, "ci95": ci}
    deviation = difference.std(ddof=1)
    with warnings.catch_warnings():
        # scipy warns of nearly equal differences, whose p-value is 0 to any precision
        warnings.simplefilter("ignore", RuntimeWarning)
        t_p = float(stats.ttest_rel(after, before).pvalue)
        wilcoxon_p = float(stats.wilcoxon(after, before).pvalue)
    return {
        "t_p": t_p,
        "wilcoxon_p": wilcoxon_p,
        "effect_size": float(difference.mean() / deviation) if deviation else nan,
        "ci95": bootstrap_ci95(difference),
    }


def bootstrap_ci95(values: NDArray[np.float64], seed: int = 0) -> list[float]:
    """Bootstrap percentile interval of the mean, 95 %."""
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(0, len(values), len(values))].mean() for _ in range(_DRAWS)]
    low, high = np.quantile(means, (0.025, 0.975))
    return [float(low), float(high)]
