from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tli_engine.align import encode as encode_module
from tli_engine.align.encode import _pack_tokens, encode, pool
from tli_engine.config import Pooling
from tli_engine.data.words import Word, pack, packs_of
from tli_engine.models.early import EarlyModel
from tli_engine.testing import random_words


def one_by_one(model: EarlyModel, words: list[Word], layer: int, pooling: Pooling) -> Tensor:
    rows = []
    with torch.no_grad():
        for word in words:
            packed = pack([word])
            rows.append(pool(model(packed, layer), packed, pooling)[0])
    return torch.stack(rows)


@pytest.mark.parametrize("pooling", ["paper", "content", "last", "weighted"])
@pytest.mark.parametrize("tokens", [1, 16, 10_000], ids=["a-word-a-pack", "some", "one-pack"])
def test_vectors_are_those_of_the_words_alone(
    tokens: int, pooling: Pooling, model: EarlyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_module, "_PACK_TOKENS", tokens)
    words = random_words(15, 9)
    vectors = encode(model, words, [0, 2, 3], pooling)
    assert vectors.shape == (3, 15, 32)
    assert vectors.dtype == torch.float32
    for row, layer in enumerate([0, 2, 3]):
        expected = one_by_one(model, words, layer, pooling)
        torch.testing.assert_close(vectors[row], expected, rtol=0, atol=2e-5)


def test_vectors_are_in_the_order_of_the_words(model: EarlyModel) -> None:
    words = random_words(15, 9)
    order = torch.randperm(15).tolist()
    shuffled = encode(model, [words[i] for i in order], [2], "content")
    torch.testing.assert_close(
        shuffled[0], encode(model, words, [2], "content")[0][order], rtol=0, atol=1e-6
    )


def test_equal_words_are_run_once(model: EarlyModel) -> None:
    words = random_words(4, 5)
    ran: list[int] = []
    vectors = encode(model, [*words, *words, words[0]], [2], "content", ran.append)
    assert sum(ran) == 4
    assert torch.equal(vectors[0, :4], vectors[0, 4:8])
    assert torch.equal(vectors[0, 8], vectors[0, 0])


def test_words_that_differ_in_content_only_are_not_equal(model: EarlyModel) -> None:
    ids = (256, 1, 2)
    words = [Word(ids, (False, True, True)), Word(ids, (False, False, True))]
    a, b = encode(model, words, [2], "content")[0]
    assert not torch.allclose(a, b)


def test_blocks_above_the_last_layer_do_not_run(model: EarlyModel) -> None:
    ran: list[int] = []
    for k, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, k=k: ran.append(k))
    encode(model, random_words(3, 4), [0, 1], "content")
    assert set(ran) == {0}


def test_no_word_is_no_vector(model: EarlyModel) -> None:
    assert encode(model, [], [0, 2], "content").shape == (2, 0, 32)


def test_nothing_is_kept_for_a_gradient(model: EarlyModel) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    assert not encode(model, random_words(3, 4), [2], "content").requires_grad


def test_progress_counts_every_distinct_word(
    model: EarlyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_module, "_PACK_TOKENS", 12)
    done: list[int] = []
    encode(model, random_words(20, 8), [1], "content", done.append)
    assert len(done) > 3
    assert sum(done) == 20


@pytest.mark.parametrize("count", [0, 1, 500, 1366, 2500, 9000])
@pytest.mark.parametrize(("width", "most"), [(1536, 8192), (14336, 4681), (1 << 20, 1024)])
def test_packs_on_a_gpu_are_large_and_of_like_size(count: int, width: int, most: int) -> None:
    model: Any = SimpleNamespace(
        device=torch.device("cuda"), config=SimpleNamespace(intermediate_size=width)
    )
    words = random_words(count, 9) if count else []
    tokens = sum(map(len, words))
    sizes = [
        sum(len(words[i]) for i in members)
        for members in packs_of(words, _pack_tokens(model, [len(w) for w in words]))
    ]
    assert len(sizes) <= -(-tokens // most)
    assert all(size <= most + 10 for size in sizes)
    # the last one is not a rest of a few words
    assert min(sizes, default=0) >= max(sizes, default=0) - 10 * (len(sizes) + 1)
