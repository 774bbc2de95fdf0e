"""Every sample once an epoch, for any number of ranks and any resumes with other numbers."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tli_engine.config import RunConfig
from tli_engine.distributed.gathered import share_of
from tli_engine.distributed.world import World
from tli_engine.train.order import batch_rows, steps_per_epoch
from tli_engine.train.sft_order import SftOrder, batches_of_rank

EPOCHS = 3
# how many ranks each part of a run has, and how many steps until it is stopped
PARTS = st.lists(st.tuples(st.integers(1, 8), st.integers(1, 9)), min_size=1, max_size=5)


def sizes(parts: list[tuple[int, int]], steps: int) -> list[int]:
    """Ranks at each step; the last part's to the end."""
    found = [size for size, length in parts for _ in range(length)]
    return (found + [parts[-1][0]] * steps)[:steps]


@given(
    lengths=st.lists(st.integers(2, 32), min_size=1, max_size=40),
    batch_size=st.integers(1, 4),
    accumulate=st.integers(1, 4),
    packing=st.booleans(),
    parts=PARTS,
)
def test_examples(
    lengths: list[int],
    batch_size: int,
    accumulate: int,
    packing: bool,
    parts: list[tuple[int, int]],
) -> None:
    train = {"epochs": EPOCHS, "batch_size": batch_size, "accumulate": accumulate}
    values = {"model": "m", "objective": "sft", "data": "a.jsonl", "train": train}
    config = RunConfig.model_validate(values | {"sft": {"context": 32, "packing": packing}})
    whole = SftOrder(np.array(lengths, np.int32), config)
    seen: list[list[int]] = [[] for _ in range(EPOCHS)]
    for step, size in enumerate(sizes(parts, whole.total_steps)):
        # each rank knows the order by itself, from the step's number alone
        orders = [SftOrder(np.array(lengths, np.int32), config) for _ in range(size)]
        shares = [
            batches_of_rank(order.batches(step), batch_size, World(rank, size))
            for rank, order in enumerate(orders)
        ]
        assert len(set(map(len, shares))) == 1
        assert max(len(batch) for share in shares for batch in share) <= batch_size
        rows = [row for share in shares for batch in share for row in batch]
        assert sorted(rows) == sorted(row for batch in whole.batches(step) for row in batch)
        seen[whole.epoch(step)] += [i for row in rows for i in row]
    for epoch in seen:
        assert sorted(epoch) == list(range(len(lengths)))


@given(
    pairs=st.integers(2, 60),
    batch_size=st.integers(2, 12),
    seed=st.integers(0, 2**63 - 1),
    parts=PARTS,
)
def test_pairs(pairs: int, batch_size: int, seed: int, parts: list[tuple[int, int]]) -> None:
    steps = steps_per_epoch(pairs, batch_size)
    seen: list[list[int]] = [[] for _ in range(EPOCHS)]
    for step, size in enumerate(sizes(parts, EPOCHS * steps)):
        for rank in range(size):
            rows = batch_rows(pairs, batch_size, seed, step)
            seen[step // steps] += [rows[i] for i in share_of(len(rows), World(rank, size))]
    for epoch in seen:
        assert sorted(epoch) == list(range(pairs))


@given(count=st.integers(0, 100), size=st.integers(1, 8))
def test_shares_are_even(count: int, size: int) -> None:
    shares = [share_of(count, World(rank, size)) for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
