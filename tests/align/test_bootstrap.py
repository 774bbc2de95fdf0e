"""Resampled means: the same draws whenever they are read, block by block."""

import numpy as np
import pytest

from tli_engine.align import bootstrap
from tli_engine.align.bootstrap import Resamples, bootstrap_means


@pytest.mark.parametrize("size", [7, 40_000], ids=["int16", "int32"])
def test_draws_are_those_of_one_generator(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # more blocks than are drawn ahead
    monkeypatch.setattr(bootstrap, "_BLOCK", 3 * size)
    draws = 3 * bootstrap._AHEAD + 2
    blocks = list(Resamples(size, draws, seed=5))
    assert [len(block) for block in blocks] == [3] * bootstrap._AHEAD + [2]
    generator = np.random.default_rng(5)
    for block in blocks:
        drawn = generator.integers(0, size, block.shape, dtype=block.dtype)
        assert np.array_equal(block, drawn)
    assert block.dtype == (np.int16 if size == 7 else np.int32)


def test_means_are_of_the_rows_drawn() -> None:
    values = np.random.default_rng(0).normal(size=(9, 2))
    means = bootstrap_means(values, Resamples(9, 50, columns=2, seed=1))
    drawn = np.concatenate(list(Resamples(9, 50, columns=2, seed=1)))
    np.testing.assert_allclose(means, values[drawn].mean(1), rtol=0, atol=1e-15)
    flat = bootstrap_means(values[:, 0].copy(), Resamples(9, 50, seed=1))
    assert flat.shape == (50,)


def test_a_mean_that_all_resamples_share() -> None:
    assert np.array_equal(bootstrap_means(np.full(5, 0.25), Resamples(5, 10)), np.full(10, 0.25))
