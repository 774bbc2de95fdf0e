"""Paired tests of a before/after difference."""

import warnings

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tli_engine.align.bootstrap import Resamples, bootstrap_means

_DRAWS = 5000
# a spread this small against the mean is fp64 rounding
_ROUNDING = 1e-12


def paired_tests(before: NDArray[np.float64], after: NDArray[np.float64]) -> dict[str, object]:
    """Test whether the paired values changed.

    Args:
        before: One value a pair.
        after: The same pairs' values.

    Returns:
        ``t_p`` and ``wilcoxon_p``, two-sided p-values of the paired t and Wilcoxon signed-rank
        tests; ``effect_size``, Cohen's d_z, the mean difference over its standard deviation;
        ``ci95``, the bootstrap percentile interval of the mean difference. NaN where fewer than
        two pairs, no difference at all, or the same one in all pairs, leave a figure undefined.
    """
    difference = after - before
    nan = float("nan")
    if len(difference) < 2 or not difference.any():
        ci = [0.0, 0.0] if len(difference) >= 2 else [nan, nan]
        return {"t_p": nan, "wilcoxon_p": nan, "effect_size": nan, "ci95": ci}
    mean, deviation = difference.mean(), difference.std(ddof=1)
    with warnings.catch_warnings():
        # scipy warns of nearly equal differences, whose p-value is 0 to any precision
        warnings.simplefilter("ignore", RuntimeWarning)
        t_p = float(stats.ttest_rel(after, before).pvalue)
        wilcoxon_p = float(stats.wilcoxon(after, before).pvalue)
    return {
        "t_p": t_p,
        "wilcoxon_p": wilcoxon_p,
        "effect_size": float(mean / deviation) if deviation > _ROUNDING * abs(mean) else nan,
        "ci95": bootstrap_ci95(difference),
    }


def bootstrap_ci95(values: NDArray[np.float64], seed: int = 0) -> list[float]:
    """Bootstrap percentile interval of the mean, 95 %."""
    means = bootstrap_means(values, Resamples(len(values), _DRAWS, seed=seed))
    low, high = np.quantile(means, (0.025, 0.975))
    return [float(low), float(high)]
