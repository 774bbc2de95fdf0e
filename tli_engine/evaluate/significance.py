"""Is one system's score another's by chance? Paired tests on the same texts, and Holm's correction.

Both tests take any score whose statistics add up over texts, corpus BLEU among them. Both are of
texts: they do not say how another seed of the training would have come out.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tli_engine.errors import UserError
from tli_engine.evaluate.text_metrics import (
    BLOCK,
    RESAMPLES,
    Array,
    Score,
    require_alike,
    resample_sums,
    score_sums,
)

# differences closer than this, of scores from 0 to 100, are ties that rounding broke
_ROUNDING = 1e-9


class PairedBootstrap(NamedTuple):
    """Of a system's score less the baseline's.

    Attributes:
        difference: The difference.
        ci95: Percentile interval over resampled texts.
        p: Two-sided: how often resampled differences lie as far from their mean.
    """

    difference: float
    ci95: tuple[float, float]
    p: float


def paired_bootstrap(
    system: Score, baseline: Score, *, resamples: int = RESAMPLES, seed: int = 0
) -> PairedBootstrap:
    """Compare two systems on the same resamples of texts (Koehn 2004).

    Equal systems have p = 1. Interval and p are NaN of fewer than two texts.

    Raises:
        UserError: The systems were not scored alike, or not on as many texts.
    """
    require_alike(system, baseline)
    difference = system.score - baseline.score
    nan = float("nan")
    if len(system.statistics) < 2:
        return PairedBootstrap(difference, (nan, nan), nan)
    both = np.hstack([system.statistics, baseline.statistics])
    sums = np.split(resample_sums(both, resamples, seed), 2, axis=1)
    ours, theirs = (
        score_sums(s.metric, d, s.runs) for s, d in zip((system, baseline), sums, strict=True)
    )
    drawn = ours - theirs
    low, high = np.quantile(drawn, (0.025, 0.975))
    p = _share_as_far(drawn - drawn.mean(), difference)
    return PairedBootstrap(difference, (float(low), float(high)), p)


def approximate_randomization(
    system: Score, baseline: Score, *, trials: int = RESAMPLES, seed: int = 0
) -> float:
    """Two-sided p-value: how often swapping the systems' texts at random parts them as far.

    (Riezler and Maxwell 2005.) Equal systems have p = 1; NaN of fewer than two texts.

    Raises:
        UserError: The systems were not scored alike, or not on as many texts or runs.
    """
    require_alike(system, baseline)
    if system.runs != baseline.runs:
        raise UserError(
            f"{system.metric} of {system.runs} runs and of {baseline.runs}: their texts cannot be swapped"
        )
    count = len(system.statistics)
    if count < 2:
        return float("nan")
    generator = np.random.default_rng(seed)
    total = system.statistics.sum(0) + baseline.statistics.sum(0)
    apart = system.statistics - baseline.statistics
    drawn = np.empty(trials)
    block = max(1, BLOCK // count)
    for start in range(0, trials, block):
        rows = min(block, trials - start)
        signs = 2.0 * generator.integers(0, 2, (rows, count), dtype=np.int8) - 1
        moved = signs @ apart
        first, second = (
            score_sums(system.metric, (total + m) / 2, system.runs) for m in (moved, -moved)
        )
        drawn[start : start + rows] = first - second
    return _share_as_far(drawn, system.score - baseline.score)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number (Holm 1979); NaN stays, and counts for no test."""
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    corrected = [float("nan")] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        corrected[i] = highest
    return corrected


def _share_as_far(drawn: Array, difference: float) -> float:
    # the observed texts are a draw of their own: p is never 0
    far = np.abs(drawn) >= abs(difference) - _ROUNDING
    return (int(far.sum()) + 1) / (len(drawn) + 1)
