from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tli_engine.config import RunConfig
from tli_engine.train.sft_order import SftOrder


def config_of(context: int = 32, **train: Any) -> RunConfig:
    values = {"model": "m", "objective": "sft", "data": "a.jsonl", "sft": {"context": context}}
    return RunConfig.model_validate(values | {"train": {"epochs": 3} | train})


@given(
    lengths=st.lists(st.integers(2, 32), min_size=1, max_size=40),
    batch_size=st.integers(1, 4),
    accumulate=st.integers(1, 3),
)
def test_every_epoch_has_each_example_once(
    lengths: list[int], batch_size: int, accumulate: int
) -> None:
    config = config_of(batch_size=batch_size, accumulate=accumulate)
    order = SftOrder(np.array(lengths, np.int32), config)
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for step in range(order.total_steps):
        batches = order.batches(step)
        assert 1 <= len(batches) <= accumulate
        for batch in batches:
            assert 1 <= len(batch) <= batch_size
            assert all(sum(lengths[i] for i in row) <= 32 for row in batch)
            seen[order.epoch(step)] += [i for row in batch for i in row]
    for epoch in seen.values():
        assert sorted(epoch) == list(range(len(lengths)))


def test_a_step_is_found_without_those_before() -> None:
    lengths = np.arange(2, 30, dtype=np.int32)
    whole = SftOrder(lengths, config_of(batch_size=2))
    steps = [whole.batches(step) for step in range(whole.total_steps)]
    for step in (7, whole.total_steps - 1, 0):
        assert SftOrder(lengths, config_of(batch_size=2)).batches(step) == steps[step]


def test_steps_may_go_on_over_many_epochs() -> None:
    order = SftOrder(np.array([20, 20], np.int32), config_of(epochs=None, steps=7, batch_size=1))
    assert order.total_steps == 7
    assert [order.epoch(step) for step in range(7)] == [0, 0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("change", [{"seed": 1}, {"sft": {"context": 32, "packing": False}}])
def test_seed_and_packing_change_the_rows(change: dict[str, Any]) -> None:
    lengths = np.arange(2, 30, dtype=np.int32)
    config = config_of()
    other = RunConfig.model_validate(config.model_dump() | change)
    assert SftOrder(lengths, config).batches(0) != SftOrder(lengths, other).batches(0)
