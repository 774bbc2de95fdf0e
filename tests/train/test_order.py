import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tli_engine.train.order import batch_rows, step_seed, steps_per_epoch

row_counts = st.integers(2, 60)
batch_sizes = st.integers(2, 20)
seeds = st.integers(0, 2**40)


@settings(deadline=None)
@given(rows=row_counts, batch_size=batch_sizes, seed=seeds, epoch=st.integers(0, 5))
def test_every_row_comes_once_an_epoch(rows: int, batch_size: int, seed: int, epoch: int) -> None:
    steps = steps_per_epoch(rows, batch_size)
    batches = [batch_rows(rows, batch_size, seed, epoch * steps + i) for i in range(steps)]
    assert Counter(row for batch in batches for row in batch) == Counter(range(rows))


@settings(deadline=None)
@given(rows=row_counts, batch_size=batch_sizes, seed=seeds)
def test_no_batch_is_without_a_negative(rows: int, batch_size: int, seed: int) -> None:
    """A pair alone has nothing to be told from; every other batch but the last is full."""
    steps = steps_per_epoch(rows, batch_size)
    sizes = [len(batch_rows(rows, batch_size, seed, step)) for step in range(steps)]
    assert min(sizes) >= 2
    assert set(sizes[:-1]) <= {batch_size}
    assert sizes[-1] <= batch_size + 1


@pytest.mark.parametrize(
    ("rows", "batch_size", "sizes"),
    [
        pytest.param(16, 8, [8, 8], id="even"),
        pytest.param(18, 8, [8, 8, 2], id="two-left"),
        pytest.param(17, 8, [8, 9], id="one-left-joins"),
        pytest.param(9, 8, [9], id="one-left-of-one-batch"),
        pytest.param(5, 8, [5], id="less-than-a-batch"),
        pytest.param(2, 2, [2], id="fewest"),
        pytest.param(3, 2, [3], id="three-by-two"),
        # the published run: 623 pairs in 78 steps an epoch, 390 in five
        pytest.param(623, 8, [8] * 77 + [7], id="published"),
    ],
)
def test_batches_have_these_sizes(rows: int, batch_size: int, sizes: list[int]) -> None:
    assert steps_per_epoch(rows, batch_size) == len(sizes)
    assert [len(batch_rows(rows, batch_size, 0, step)) for step in range(len(sizes))] == sizes


def test_a_batch_is_a_function_of_seed_and_step_alone() -> None:
    expected = batch_rows(50, 8, seed=3, step=40)
    torch.manual_seed(99)
    for step in (7, 0, 40):
        before = torch.get_rng_state()
        again = batch_rows(50, 8, seed=3, step=step)
        assert torch.equal(torch.get_rng_state(), before)
    assert again == expected


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [
        tuple(batch_rows(30, 30, seed, epoch)) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    assert len(set(orders)) == 4


def test_rows_are_shuffled_evenly() -> None:
    """Over many epochs a row is as often in the first batch as any other."""
    rows, epochs = 10, 2000
    counts = Counter(row for epoch in range(epochs) for row in batch_rows(rows, 5, 0, epoch * 2))
    expected = epochs / 2
    assert all(abs(counts[row] - expected) < 5 * math.sqrt(expected / 2) for row in range(rows))


def test_step_seeds_do_not_repeat() -> None:
    drawn = {step_seed(seed, step) for seed in range(50) for step in range(200)}
    assert len(drawn) == 50 * 200
    assert all(0 <= s < 2**63 for s in drawn)
    # nor are they those of the orders of the epochs, which torch would draw alike
    torch.manual_seed(step_seed(0, 0))
    assert torch.randperm(30).tolist() != batch_rows(30, 30, 0, 0)


@settings(deadline=None)
@given(seed=st.integers(0, 2**63), step=st.integers(0, 2**31))
def test_any_seed_is_one_that_torch_takes(seed: int, step: int) -> None:
    torch.Generator().manual_seed(step_seed(seed, step))
