"""Goals of kernels and of the align step are judged by what was measured, not by what is printed."""

import pytest

from bench.goals import judged


@pytest.mark.parametrize(
    ("values", "goal", "at_least", "shown"),
    [
        ([1.5042], 1.5, False, "1.504"),
        ([1.50004], 1.5, False, "1.50004"),
        ([1.4958], 1.5, False, "**1.50**"),
        ([1.5], 1.5, False, "**1.50**"),
        ([1.51], 1.5, False, "1.51"),
        ([0.9961, 1.031], 1.0, True, "0.996-1.03"),
        ([1.0, 1.031], 1.0, True, "**1.00-1.03**"),
        ([1.151, 1.1539], 1.15, True, "**1.15**"),
        ([0.011, 0.0604], 0.06, False, "0.01-0.0604"),
        ([2.1, 2.3], 2.7, True, "2.10-2.30"),
    ],
)
def test_a_miss_is_told_before_rounding_and_shown(
    values: list[float], goal: float, at_least: bool, shown: str
) -> None:
    assert judged(values, goal, at_least) == shown
