"""The scan on a GPU: nothing waits for the device, and figures are those of the CPU's fp64."""

from pathlib import Path

import pytest
import torch

from tli_engine.align import encode as encode_module
from tli_engine.align import pairing
from tli_engine.align.encode import stage
from tli_engine.align.layers import vectors_by_layer
from tli_engine.align.pairing import Pairing
from tli_engine.align.replay import Measure
from tli_engine.align.retrieval import read
from tli_engine.models.early import EarlyModel, load_early
from tli_engine.models.files import open_model
from tli_engine.testing import random_words, save_tiny_model

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
GROUPS = [i // 2 for i in range(60)], [*range(30), *range(30)]


@pytest.fixture
def model(tmp_path: Path) -> EarlyModel:
    files = open_model(str(save_tiny_model(tmp_path / "llama", "llama")))
    return load_early(files, 4, dtype=torch.float32, device=CUDA)


def vectors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 40, generator=generator)
    y = x + 0.8 * torch.randn(30, 40, generator=generator)
    # two of each that cannot be told apart, and one that is broken
    x[7], y[11], x[3] = x[6], y[10], torch.nan
    return x[GROUPS[0]], y[GROUPS[1]]


@pytest.mark.parametrize("tiled", [False, True], ids=["whole", "tiled"])
def test_figures_are_those_of_the_cpu(tiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = vectors()
    expected = read(Pairing(*GROUPS, torch.device("cpu")).measure(x, y))
    if tiled:
        sizes = {"_ROWS": 8, "_COLUMNS": 7, "_KEPT": 0, "_VALUES": 90, "_MANY": 1, "_GROUP": 2}
        for name, size in sizes.items():
            monkeypatch.setattr(pairing, name, size)
    actual = read(Pairing(*GROUPS, CUDA).measure(x.to(CUDA), y.to(CUDA)))
    torch.testing.assert_close(actual.true, expected.true, rtol=0, atol=1e-13, equal_nan=True)
    for ours, theirs in (
        (actual.forward, expected.forward),
        (actual.reverse, expected.reverse),
    ):
        assert torch.equal(ours.reciprocal_ranks, theirs.reciprocal_ranks)
        assert ours.to_json() == theirs.to_json()


def test_the_largest_are_found_in_groups_of_many() -> None:
    cosine = torch.randn(64, 5000, dtype=torch.float64, device=CUDA)
    for x in (cosine, cosine.T.contiguous().T):
        assert torch.equal(pairing._largest(x), x.topk(10).values)


@pytest.mark.parametrize("on_host", [False, True], ids=["on-device", "on-host"])
def test_nothing_waits_for_the_device(
    on_host: bool, model: EarlyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # packs of a few words, and determinism that waits switched off as it is for a user
    monkeypatch.setattr(encode_module, "_PACK_TOKENS", 64)
    monkeypatch.setattr(encode_module, "_PACK_TOKENS_GPU", 64)
    torch.use_deterministic_algorithms(False)
    words = random_words(60, 9)
    staged = stage(model, words, ["paper", "content"])
    assert len(staged.packs) > 2
    rows = [staged.row_of[word] for word in words]
    compare = Pairing(*GROUPS, CUDA, rows, rows[::-1])
    room = 0 if on_host else None

    def figures() -> list[pairing.Figures]:
        layers = vectors_by_layer(model, staged, room=room)
        return [compare.measure(v, v) for _, vectors in layers for v in vectors]

    # kernels are compiled, and buffers made
    figures()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = figures()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(found) == 2 * 5
    assert all(torch.isfinite(f.of_pairs).all() for f in found)


def test_vectors_on_the_host_are_those_on_the_device(
    model: EarlyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_module, "_PACK_TOKENS", 64)
    monkeypatch.setattr(encode_module, "_PACK_TOKENS_GPU", 64)
    staged = stage(model, random_words(60, 9), ["content"])
    lines: list[str] = []
    on_device, on_host = (
        [v.clone() for _, v in vectors_by_layer(model, staged, room=room, say=lines.append)]
        for room in (None, 0)
    )
    for ours, theirs in zip(on_host, on_device, strict=True):
        assert torch.equal(ours, theirs)
    (line,) = lines
    assert "they stay in the host's memory" in line


def test_packs_are_larger_than_on_a_cpu_and_of_like_size(model: EarlyModel) -> None:
    words = random_words(4000, 9)
    tokens = sum(map(len, dict.fromkeys(words)))
    packs = [len(part.pack.input_ids) for part in stage(model, words, ["content"]).packs]
    assert sum(packs) == tokens
    assert len(packs) == -(-tokens // 8192)


def test_replayed_figures_are_those_of_single_launches() -> None:
    """From the second layer on a graph compares the vectors, in a stream of its own."""
    groups = [i if i % 5 else 0 for i in range(50)]
    compare = Pairing(groups, list(range(50)), CUDA, None, list(range(50, 100)))
    measure, expected = Measure(compare, 50), []
    vectors = torch.empty(2, 100, 96, device=CUDA)
    for _ in range(6):
        # overwritten while the comparison before may still run
        vectors.normal_()
        measure.add(vectors)
        expected.append([v.clone() for v in vectors])
    by_pooling = measure.figures()
    assert [len(of_pooling) for of_pooling in by_pooling] == [6, 6]
    for layer, of_layer in enumerate(expected):
        for of_pooling, v in zip(by_pooling, of_layer, strict=True):
            figures, single = of_pooling[layer], compare.measure(v, v)
            assert torch.equal(figures.of_pairs, single.of_pairs)
            assert torch.equal(figures.random, single.random)
