import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tli_engine.align.encode import pool
from tli_engine.align.pooling import pooling_weight
from tli_engine.config import Pooling
from tli_engine.data.words import Word, pack

POOLINGS: list[Pooling] = ["paper", "content", "last", "weighted"]

# which tokens are the word's own: any, but at least one
contents = st.lists(st.booleans(), min_size=1, max_size=7).filter(any)


def word(content: list[bool]) -> Word:
    return Word(tuple(range(len(content))), tuple(content))


def naive_weight(content: list[bool], pooling: Pooling) -> list[float]:
    weight, rank = [], 0
    for i, own in enumerate(content):
        rank += own
        match pooling:
            case "paper":
                weight.append(1.0)
            case "content":
                weight.append(float(own))
            case "last":
                weight.append(float(own and not any(content[i + 1 :])))
            case "weighted":
                weight.append(float(rank * own))
    return weight


def naive_vector(hidden: Tensor, weight: list[float]) -> Tensor:
    total = torch.zeros(hidden.shape[1], dtype=torch.float64)
    for row, w in zip(hidden.double(), weight, strict=True):
        total += w * row
    return total / sum(weight)


@settings(deadline=None)
@given(words=st.lists(contents, min_size=1, max_size=6), pooling=st.sampled_from(POOLINGS))
def test_weights_and_vectors_equal_a_loop_over_the_words(
    words: list[list[bool]], pooling: Pooling
) -> None:
    packed = pack([word(content) for content in words])
    expected = [naive_weight(content, pooling) for content in words]
    weight = pooling_weight(packed, pooling)
    assert weight.dtype == torch.float32
    assert weight.tolist() == [w for of_word in expected for w in of_word]

    hidden = torch.randn(len(packed.input_ids), 5)
    vectors = pool(hidden, packed, pooling)
    lengths = [len(content) for content in words]
    for vector, states, w in zip(vectors, hidden.split(lengths), expected, strict=True):
        torch.testing.assert_close(vector.double(), naive_vector(states, w), rtol=0, atol=1e-5)


BOS = [False, True, True, True]
CASES = [
    pytest.param("paper", BOS, [1, 1, 1, 1], id="paper-counts-bos"),
    pytest.param("content", BOS, [0, 1, 1, 1], id="content-leaves-bos-out"),
    pytest.param("last", BOS, [0, 0, 0, 1], id="last"),
    pytest.param("weighted", BOS, [0, 1, 2, 3], id="weighted-ranks-from-1-after-bos"),
    pytest.param("last", [False, True, True, False], [0, 0, 1, 0], id="last-before-eos"),
    pytest.param("weighted", [False, True, True, False], [0, 1, 2, 0], id="weighted-before-eos"),
    pytest.param("weighted", [False, False, True], [0, 0, 1], id="weighted-two-prefix-tokens"),
    # a template: the word between other words
    pytest.param("content", [False, False, True, True, False], [0, 0, 1, 1, 0], id="template"),
    pytest.param("last", [True], [1], id="one-token"),
]


@pytest.mark.parametrize(("pooling", "content", "expected"), CASES)
def test_weights_do_not_depend_on_the_place_in_the_pack(
    pooling: Pooling, content: list[bool], expected: list[float]
) -> None:
    others = [word([False, True, True]), word([True])]
    for before in ([], others[:1], others):
        packed = pack([*before, word(content), *others])
        start = sum(len(w) for w in before)
        weight = pooling_weight(packed, pooling)
        assert weight[start : start + len(content)].tolist() == expected


@pytest.mark.parametrize("pooling", POOLINGS[1:])
def test_bos_does_not_reach_the_vector(pooling: Pooling) -> None:
    packed = pack([word([False, True, True]), word([False, True])])
    hidden = torch.randn(5, 4)
    vectors = pool(hidden, packed, pooling)
    massive = hidden.clone()
    massive[[0, 3]] = 1e4
    torch.testing.assert_close(pool(massive, packed, pooling), vectors, rtol=0, atol=0)
    # it does with the published pooling, and makes all words alike
    a, b = pool(massive, packed, "paper")
    assert torch.cosine_similarity(a, b, dim=0) > 0.999
