"""Before and after training: what is compared with what, and by whose statistics."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tli_engine.align.encode import encode
from tli_engine.align.retrieval import measure_alignment
from tli_engine.config import LoraConfig
from tli_engine.data.pairs import PairList
from tli_engine.data.splits import Split
from tli_engine.data.words import Word
from tli_engine.evaluate import statistics
from tli_engine.evaluate.alignment import (
    Row,
    Vectors,
    alignment_rows,
    encode_before_after,
    layer_curve,
    mismatched_cosines,
)
from tli_engine.evaluate.statistics import bootstrap_ci95, paired_tests
from tli_engine.models.adapters import adapter_tensors, adapters, add_lora
from tli_engine.models.early import EarlyModel, load_early
from tli_engine.models.files import open_model
from tli_engine.testing import save_tiny_model

# the contract of evaluation.json, in DESIGN.md
STAGE = {"cosine_true", "cosine_random", "separation", "p_at_1", "mrr", "csls_p_at_1", "reverse"}
ROW = {"layer", "pooling", "presentation", "score", "split", "before", "after", "tests"}
TESTS = {"t_p", "wilcoxon_p", "effect_size", "ci95"}
WIDTH = 12


def split_of(name: str, source: list[str], target: list[str]) -> Split:
    """A split whose words are their own bytes, after a BOS token."""

    def words(column: list[str]) -> list[Word]:
        return [
            Word((256, *word.encode()), (False, *[True] * len(word.encode()))) for word in column
        ]

    pairs = PairList(("swahili", "english"), tuple(source), tuple(target))
    return Split(name, pairs, words(source), words(target))


def vectors_of(split: Split, seed: int) -> Vectors:
    """Random vectors with a mean of their own per language; equal words have equal ones."""
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for groups in split.groups * 2:
        offset = 2 * torch.randn(WIDTH, generator=generator)
        scale = torch.rand(WIDTH, generator=generator) + 0.2
        distinct = torch.randn(max(groups) + 1, WIDTH, generator=generator) * scale + offset
        sides.append(distinct[groups])
    return Vectors(split, torch.cat(sides[:2]), torch.cat(sides[2:]))


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bootstrap is tested elsewhere."""
    monkeypatch.setattr(statistics, "_DRAWS", 100)


@pytest.fixture
def train() -> Vectors:
    """Thirty pairs; the first source has two translations, the last target two sources."""
    source = ["neno0", "neno0", *(f"neno{i}" for i in range(2, 30))]
    target = [*(f"word{i}" for i in range(28)), "word28", "word28"]
    return vectors_of(split_of("train", source, target), 1)


@pytest.fixture
def control() -> Vectors:
    names = [f"{i}" for i in range(14)]
    return vectors_of(
        split_of("control", [f"jina{i}" for i in names], [f"name{i}" for i in names]), 2
    )


def rows_of(vectors: list[Vectors]) -> dict[tuple[str, str], Row]:
    rows = alignment_rows(vectors, 2, "content", "bare")
    assert len(rows) == 3 * len(vectors)
    return {(row.score, row.split): row for row in rows}


def with_word(vectors: Vectors, row: int) -> Vectors:
    """The same but for the vector of one word, before and after."""
    changed = [stage.clone() for stage in (vectors.before, vectors.after)]
    for stage in changed:
        stage[row] = 50 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(9))
    return replace(vectors, before=changed[0], after=changed[1])


def stages(row: Row) -> list[dict[str, Any]]:
    return [row.before.to_json(), row.after.to_json()]


def test_rows_hold_what_the_contract_says(train: Vectors, control: Vectors) -> None:
    rows = rows_of([train, control])
    scores = ("cosine", "centred", "whitened")
    assert set(rows) == {(score, split) for score in scores for split in ("train", "control")}
    for (score, split), row in rows.items():
        found = row.to_json()
        assert found.keys() >= ROW
        assert (found["score"], found["split"], found["layer"]) == (score, split, 2)
        assert (found["pooling"], found["presentation"]) == ("content", "bare")
        for stage in (found["before"], found["after"]):
            assert stage.keys() >= STAGE
            assert stage["reverse"].keys() >= {"p_at_1", "mrr", "csls_p_at_1"}
            assert stage["separation"] == stage["cosine_true"] - stage["cosine_random"]
        assert found["tests"].keys() >= TESTS
        assert found["tests"]["mrr"].keys() >= TESTS
        assert found["pairs"] == {"train": 30, "control": 14}[split]
        json.dumps(found)


def test_without_control_pairs_there_are_only_training_rows(train: Vectors) -> None:
    assert {split for _, split in rows_of([train])} == {"train"}


def test_control_words_have_no_part_in_the_statistics(train: Vectors, control: Vectors) -> None:
    rows = rows_of([train, control])
    changed = rows_of([train, with_word(control, 3)])
    for (score, split), row in changed.items():
        expected = rows[score, split]
        if split == "train":
            assert stages(row) == stages(expected)
            continue
        # the spaces are the same: other control pairs lie as they lay
        others = torch.arange(len(row.before.true)) != 3
        for a, e in ((row.before, expected.before), (row.after, expected.after)):
            assert torch.equal(a.true[others], e.true[others])
            assert not torch.equal(a.true[~others], e.true[~others])


def test_training_words_make_the_statistics(train: Vectors, control: Vectors) -> None:
    rows = rows_of([train, control])
    changed = rows_of([with_word(train, 40), control])
    assert stages(changed["cosine", "control"]) == stages(rows["cosine", "control"])
    for score in ("centred", "whitened"):
        assert stages(changed[score, "control"]) != stages(rows[score, "control"])


def test_each_stage_has_statistics_of_its_own(train: Vectors, control: Vectors) -> None:
    rows = rows_of([train, control])
    other = replace(train, after=train.after.flip(0))
    for (score, split), row in rows_of([other, control]).items():
        assert row.before.to_json() == rows[score, split].before.to_json()
        if (score, split) != ("cosine", "control"):
            assert row.after.to_json() != rows[score, split].after.to_json()


def expected_cosines(train: Tensor, groups: tuple[list[int], list[int]], x: Tensor) -> Any:
    """By hand: each language's mean and covariance over its distinct training words."""
    found: dict[str, list[Any]] = {"cosine": [], "centred": [], "whitened": []}
    for side, ids, words in zip(train.chunk(2), groups, x.chunk(2), strict=True):
        values = side.double().numpy()
        distinct = np.stack([values[ids.index(g)] for g in range(max(ids) + 1)])
        mean = distinct.mean(0)
        covariance = np.cov(distinct.T, bias=True)
        shrunk = 0.5 * covariance + 0.5 * np.trace(covariance) / WIDTH * np.eye(WIDTH)
        eigenvalues, basis = np.linalg.eigh(shrunk)
        root = basis @ np.diag(eigenvalues**-0.5) @ basis.T
        raw = words.double().numpy()
        found["cosine"].append(raw)
        found["centred"].append(raw - mean)
        found["whitened"].append((raw - mean) @ root)
    return {
        score: (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        for score, (a, b) in found.items()
    }


def test_scores_are_those_of_the_definition(train: Vectors, control: Vectors) -> None:
    """A word that occurs twice counts once."""
    rows = rows_of([train, control])
    assert len(set(train.split.groups[0])) == len(set(train.split.groups[1])) == 29
    for v in (train, control):
        for stage in ("before", "after"):
            fitted = getattr(train, stage)
            expected = expected_cosines(fitted, train.split.groups, getattr(v, stage))
            for score, cosines in expected.items():
                actual = getattr(rows[score, v.split.name], stage).true
                np.testing.assert_allclose(actual, cosines, rtol=0, atol=1e-9)


def test_tests_are_on_cosines_and_on_reciprocal_ranks(train: Vectors, control: Vectors) -> None:
    row = rows_of([train, control])["whitened", "control"]
    found = row.to_json()["tests"]
    cosines = row.before.true.numpy(), row.after.true.numpy()
    ranks = [a.two_way_reciprocal_ranks.numpy() for a in (row.before, row.after)]
    assert {key: found[key] for key in TESTS} == paired_tests(*cosines)
    assert {key: found["mrr"][key] for key in TESTS} == paired_tests(*ranks)
    assert found["mrr"]["after_ci95"] == bootstrap_ci95(ranks[1])
    low, high = found["mrr"]["after_ci95"]
    assert low <= ranks[1].mean() <= high


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny matmuls: more threads wait for one another on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model(folder: Path) -> EarlyModel:
    """A tiny model whose adapters are not zero."""
    files = open_model(str(folder))
    model = load_early(files, 3, dtype=torch.float32, device=torch.device("cpu"))
    add_lora(model, LoraConfig(r=4, alpha=8), 2, seed=0)
    generator = torch.Generator().manual_seed(0)
    for tensor in adapter_tensors(model).values():
        tensor.data += 0.1 * torch.randn(tensor.shape, generator=generator)
    return model


@pytest.fixture
def words() -> Split:
    return split_of(
        "train",
        ["maji", "moto", "mti", "ndege", "maji", "jua"],
        ["water", "fire", "tree", "bird", "waters", "sun"],
    )


def test_strength_nought_changes_nothing(model: EarlyModel, words: Split) -> None:
    vectors = encode_before_after(model, words, [1, 2, 3], "content", strength=0.0)
    for v in vectors.values():
        assert torch.equal(v.before, v.after)
    for row in alignment_rows([vectors[2]], 2, "content", "bare", 0.0):
        found = row.to_json()
        assert found["strength"] == 0
        assert found["before"] == found["after"]
        assert found["tests"]["ci95"] == [0, 0]
        assert all(math.isnan(found["tests"][key]) for key in TESTS - {"ci95"})


def test_before_is_the_base_model_and_after_the_adapted_one(
    model: EarlyModel, words: Split, folder: Path
) -> None:
    vectors = encode_before_after(model, words, [0, 2, 3], "content")
    assert list(vectors) == [0, 2, 3]
    base = load_early(open_model(str(folder)), 3, dtype=torch.float32, device=torch.device("cpu"))
    expected = encode(base, words.words, [0, 2, 3], "content")
    adapted = encode(model, words.words, [0, 2, 3], "content")
    for i, (layer, v) in enumerate(vectors.items()):
        assert v.split is words
        assert torch.equal(v.before, expected[i]), layer
        assert torch.equal(v.after, adapted[i]), layer
        # embeddings have no adapter below them
        assert torch.equal(v.before, v.after) == (layer == 0)


def test_strength_scales_what_the_adapters_add(model: EarlyModel, words: Split) -> None:
    half = encode_before_after(model, words, [1], "content", strength=0.5)[1]
    whole = encode_before_after(model, words, [1], "content")[1]
    assert torch.equal(half.before, whole.before)
    assert not torch.equal(half.after, whole.after)
    # as if it had been trained to that
    for tensor in (t for n, t in adapter_tensors(model).items() if ".lora_B." in n):
        tensor.data *= 0.5
    torch.testing.assert_close(
        half.after, encode_before_after(model, words, [1], "content")[1].after
    )


def test_measuring_leaves_the_model_as_it_was(model: EarlyModel, words: Split) -> None:
    before = [(a.scaling, a.active) for a in adapters(model).values()]
    encode_before_after(model, words, [2], "content", strength=0.25)
    assert [(a.scaling, a.active) for a in adapters(model).values()] == before
    assert before == [(2.0, True)] * 4


def test_progress_counts_every_distinct_word_twice(model: EarlyModel, words: Split) -> None:
    counts: list[int] = []
    encode_before_after(model, words, [2], "content", advance=counts.append)
    assert sum(counts) == 2 * 11


def test_layer_curve_measures_every_layer(model: EarlyModel, words: Split) -> None:
    vectors = encode_before_after(model, words, range(4), "content")
    curve = layer_curve(vectors)
    assert list(curve) == [0, 1, 2, 3]
    for layer, (before, after) in curve.items():
        for stage, actual in ((vectors[layer].before, before), (vectors[layer].after, after)):
            expected = measure_alignment(*stage.chunk(2), *words.groups)
            assert actual.to_json() == expected.to_json()
    assert curve[0][0].to_json() == curve[0][1].to_json()
    assert curve[2][0].to_json() != curve[2][1].to_json()


def test_mismatched_pairs_share_no_word(train: Vectors) -> None:
    found = mismatched_cosines(train.before, train.split, shifts=100)
    source, target = (
        torch.nn.functional.normalize(side.double()) for side in train.before.chunk(2)
    )
    first, second = (torch.tensor(g) for g in train.split.groups)
    mismatched = (first[:, None] != first) & (second[:, None] != second)
    expected = (source @ target.T)[mismatched]
    assert len(expected) == 30 * 29 - 4
    torch.testing.assert_close(found.sort().values, expected.sort().values, rtol=0, atol=1e-12)
    # their mean is the one that is reported
    row = rows_of([train])["cosine", "train"]
    assert found.mean().item() == pytest.approx(row.before.cosine_random, abs=1e-12)


def test_a_few_mismatched_pairs_are_enough_for_a_picture(control: Vectors) -> None:
    assert len(mismatched_cosines(control.before, control.split)) == 8 * 14


@pytest.mark.parametrize(
    ("source", "target"),
    [(["maji"], ["water"]), (["maji", "maji"], ["water", "waters"])],
    ids=["one-pair", "one-word"],
)
def test_no_mismatched_pairs(source: list[str], target: list[str]) -> None:
    v = vectors_of(split_of("control", source, target), 0)
    assert mismatched_cosines(v.before, v.split).shape == (0,)


def test_one_control_pair_is_reported_as_far_as_it_goes(train: Vectors) -> None:
    single = vectors_of(split_of("control", ["jina"], ["name"]), 5)
    found = rows_of([train, single])["whitened", "control"].to_json()
    assert found["pairs"] == 1
    assert -1 <= found["after"]["cosine_true"] <= 1
    assert math.isnan(found["after"]["cosine_random"])
    assert math.isnan(found["tests"]["t_p"])
