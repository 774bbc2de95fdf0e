from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tli_engine.data.examples import Example
from tli_engine.data.packing import rows_of_epoch, text_pack
from tli_engine.errors import UserError

CONTEXT = 64
lengths_of_examples = st.lists(st.integers(1, CONTEXT), max_size=300)


def rows(lengths: list[int], seed: int = 0, epoch: int = 0, packing: bool = True) -> Any:
    return rows_of_epoch(np.array(lengths, np.int32), CONTEXT, seed, epoch, packing)


@given(lengths_of_examples, st.integers(0, 2**63 - 1), st.integers(0, 1000), st.booleans())
def test_each_example_is_in_one_row_and_no_row_is_over_the_context(
    lengths: list[int], seed: int, epoch: int, packing: bool
) -> None:
    result = rows(lengths, seed, epoch, packing)
    assert sorted(i for row in result for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= CONTEXT for row in result)
    if not packing:
        assert {len(row) for row in result} <= {1}


@given(lengths_of_examples, st.integers(0, 2**63 - 1), st.integers(0, 1000), st.booleans())
def test_rows_are_a_function_of_seed_and_epoch(
    lengths: list[int], seed: int, epoch: int, packing: bool
) -> None:
    expected = rows(lengths, seed, epoch, packing)
    torch.manual_seed(1)
    np.random.default_rng().random()
    rows(lengths, seed + 1, epoch + 1, packing)
    assert rows(lengths, seed, epoch, packing) == expected


@pytest.mark.parametrize("packing", [True, False])
def test_order_changes_with_seed_and_with_epoch(packing: bool) -> None:
    lengths = [1 + i % CONTEXT for i in range(500)]
    orders = [rows(lengths, *of, packing) for of in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_first_fit_decreasing() -> None:
    # 40 and 24 fill a row, and so do 34 and 30; first-fit in the order given takes three rows
    (a, b) = sorted(sorted(row) for row in rows([24, 30, 34, 40]))
    assert (a, b) == ([0, 3], [1, 2])


@given(st.lists(st.integers(1, CONTEXT), min_size=1, max_size=300), st.integers(0, 100))
def test_no_two_rows_would_fit_into_one(lengths: list[int], seed: int) -> None:
    filled = sorted(sum(lengths[i] for i in row) for row in rows(lengths, seed))
    assert len(filled) == 1 or filled[0] + filled[1] > CONTEXT


def test_windows_keep_the_order_to_chance() -> None:
    """Rows of long examples do not come first in an epoch, and they are filled nonetheless."""
    lengths = [1 + i % CONTEXT for i in range(3000)]
    result = rows(lengths)
    longest = [max(lengths[i] for i in row) for row in result]
    half = len(longest) // 2
    assert abs(np.mean(longest[:half]) - np.mean(longest[half:])) < 5
    assert sum(lengths) / len(result) / CONTEXT > 0.97


def test_an_example_over_the_context() -> None:
    with pytest.raises(ValueError, match="an example of 65 tokens is longer than a row of 64"):
        rows([3, 65])


def example(prompt: list[int], answer: list[int]) -> Example:
    return Example((*prompt, *answer), len(prompt))


def test_a_position_predicts_the_next_token_of_its_own_answer() -> None:
    examples = [example([1, 2, 3], [4, 5]), example([6], [7]), example([8, 9], [10, 11, 12])]
    pack = text_pack(examples)
    assert pack.words.input_ids.tolist() == list(range(1, 13))
    assert pack.words.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4]
    assert pack.predicting.tolist() == [2, 3, 5, 8, 9, 10]
    assert pack.targets.tolist() == [4, 5, 7, 10, 11, 12]
    assert pack.predicting.dtype == pack.targets.dtype == torch.int64
    assert (pack.tokens, pack.labels) == (12, 6)
    assert pack.words.words == 3


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), min_size=1, max_size=10))
def test_labels_of_a_pack_are_those_of_its_examples(sizes: list[tuple[int, int]]) -> None:
    """Also of an example with no prompt, whose first token nothing predicts."""
    numbers = iter(range(1000))
    examples = [
        Example(tuple(next(numbers) for _ in range(prompt + answer)), prompt)
        for prompt, answer in sizes
    ]
    expected = [
        pair
        for e in examples
        for pair in zip(e.input_ids[:-1], e.input_ids[1:], strict=True)
        if pair[1] in e.input_ids[e.prompt :]
    ]
    if not expected:
        with pytest.raises(UserError):
            text_pack(examples)
        return
    pack = text_pack(examples)
    seen = pack.words.input_ids[pack.predicting].tolist()
    assert list(zip(seen, pack.targets.tolist(), strict=True)) == expected


def test_a_row_without_labels() -> None:
    for examples in ([Example((1, 2, 3), 3)], [Example((1,), 0)]):
        with pytest.raises(UserError, match=r"none of the \d tokens of a row is a label: every"):
            text_pack(examples)
    with pytest.raises(UserError, match="needs at least one example"):
        text_pack([])


def test_to_a_device() -> None:
    pack = text_pack([example([1], [2])])
    moved = pack.to(torch.device("meta"))
    assert {moved.words.input_ids.device.type, moved.targets.device.type} == {"meta"}
    assert moved.predicting.device.type == "meta"
