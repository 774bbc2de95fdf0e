"""The baseline to beat finds what a linear map can, and nothing where there is nothing."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tli_engine.align.retrieval import chance_mrr, measure_alignment
from tli_engine.data.pairs import PairList
from tli_engine.data.splits import Split
from tli_engine.evaluate.alignment import Row, Vectors
from tli_engine.evaluate.linear_head import linear_head_rows

WIDTH, TRAIN, CONTROL = 16, 160, 60


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def split_of(name: str, source: list[str], target: list[str]) -> Split:
    return Split(name, PairList(("swahili", "english"), tuple(source), tuple(target)), [], [])


def vectors_of(name: str, source: Tensor, target: Tensor) -> Vectors:
    """Of words that all differ; what training made of them must not matter."""
    words = [f"{name} {i}" for i in range(len(source))]
    before = torch.cat([source, target])
    return Vectors(split_of(name, words, words), before, torch.full_like(before, torch.nan))


def planted(width: int = WIDTH) -> list[Vectors]:
    """The second language is the first, turned, stretched, moved, and a little noise."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(width, width, generator=generator)
    offset = 3 * torch.randn(width, generator=generator)
    found = []
    for name, count in (("train", TRAIN), ("control", CONTROL)):
        source = torch.randn(count, width, generator=generator)
        noise = 0.05 * torch.randn(count, width, generator=generator)
        found.append(vectors_of(name, source, source @ matrix + offset + noise))
    return found


def unrelated() -> list[Vectors]:
    generator = torch.Generator().manual_seed(1)
    sizes = (("train", TRAIN), ("control", CONTROL))
    return [
        vectors_of(name, *torch.randn(2, count, WIDTH, generator=generator))
        for name, count in sizes
    ]


def fit(vectors: list[Vectors]) -> dict[str, Row]:
    return {row.split: row for row in linear_head_rows(vectors, 2, "content", "bare")}


@pytest.fixture(scope="module")
def rows(_one_thread: None) -> dict[str, Row]:
    """Of the planted relation."""
    return fit(planted())


def two_way_mrr(row: Row, stage: str = "after") -> float:
    return float(getattr(row, stage).two_way_reciprocal_ranks.mean())


def test_a_linear_relation_is_found_and_holds_for_unseen_pairs(rows: dict[str, Row]) -> None:
    for split, count in (("train", TRAIN), ("control", CONTROL)):
        assert two_way_mrr(rows[split], "before") < 3 * chance_mrr(count)
        assert two_way_mrr(rows[split]) > 0.9
        assert rows[split].after.separation > 0.5


def test_unrelated_languages_stay_at_chance_on_unseen_pairs() -> None:
    rows = fit(unrelated())
    # it can learn some of the training pairs by heart, which is why there are control pairs
    assert two_way_mrr(rows["train"]) > 3 * chance_mrr(TRAIN)
    ranks = rows["control"].after.two_way_reciprocal_ranks
    error = float(ranks.std()) / math.sqrt(len(ranks))
    assert abs(float(ranks.mean()) - chance_mrr(CONTROL)) < 4 * error
    assert abs(rows["control"].after.separation) < 0.1


def same(actual: Row, expected: Row) -> bool:
    stages = ((actual.before, expected.before), (actual.after, expected.after))
    return all(a.to_json() == e.to_json() and torch.equal(a.true, e.true) for a, e in stages)


def test_it_is_the_same_every_time(rows: dict[str, Row]) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again = fit(planted())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(same(again[split], row) for split, row in rows.items())


def test_rows_say_what_they_are(rows: dict[str, Row]) -> None:
    assert list(rows) == ["train", "control"]
    for v in planted():
        row = rows[v.split.name]
        assert (row.layer, row.pooling, row.presentation) == (2, "content", "bare")
        assert (row.score, row.strength) == ("cosine", 1.0)
        # before is the frozen model as it is
        expected = measure_alignment(*v.before.chunk(2), *v.split.groups)
        assert row.before.to_json() == expected.to_json()
        found = row.to_json()
        assert found.keys() >= {"before", "after", "tests", "split", "layer", "score"}


def test_control_pairs_have_no_part_in_the_fit(rows: dict[str, Row]) -> None:
    train, control = planted()
    changed = control.before.clone()
    changed[[5, CONTROL + 5]] = 100.0
    again = fit([train, replace(control, before=changed)])
    assert same(again["train"], rows["train"])
    others = torch.arange(CONTROL) != 5
    assert torch.equal(again["control"].after.true[others], rows["control"].after.true[others])


def test_what_training_made_of_the_model_does_not_matter(rows: dict[str, Row]) -> None:
    trained = [replace(v, after=v.before + 7) for v in planted()]
    assert all(same(row, rows[split]) for split, row in fit(trained).items())


def test_units_and_origin_do_not_matter(rows: dict[str, Row]) -> None:
    """The head begins in the whitened space, whatever scale the model's layer has."""
    moved = [replace(v, before=1000 * v.before + 5) for v in planted()]
    for split, row in fit(moved).items():
        assert row.after.cosine_true == pytest.approx(rows[split].after.cosine_true, abs=0.02)


def test_fewer_pairs_than_dimensions() -> None:
    """As with a real model: 4096 wide, a few hundred pairs; the head is 256 wide at most."""
    rows = fit([replace_width(v, 300) for v in planted()])
    for row in rows.values():
        assert torch.isfinite(row.after.true).all()
    assert two_way_mrr(rows["control"]) > 0.5


def replace_width(vectors: Vectors, width: int) -> Vectors:
    """The same vectors, spread over more dimensions."""
    basis = torch.linalg.qr(torch.randn(width, WIDTH, generator=torch.Generator().manual_seed(3))).Q
    return replace(vectors, before=vectors.before @ basis.T)


def test_words_with_several_translations() -> None:
    generator = torch.Generator().manual_seed(0)
    distinct = torch.randn(20, WIDTH, generator=generator)
    ids = [*range(20), *range(20)]
    source = [f"neno{i}" for i in ids]
    target = [f"word{i}" for i in range(40)]
    noise = 0.1 * torch.randn(40, WIDTH, generator=generator)
    before = torch.cat([distinct[ids], distinct[ids] + noise])
    rows = fit([Vectors(split_of("train", source, target), before, before)])
    assert rows["train"].after.forward.candidates == 40
    assert rows["train"].after.reverse.candidates == 20
    assert two_way_mrr(rows["train"]) > 0.9


def test_two_pairs_are_enough_to_run() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = vectors_of("train", *torch.randn(2, 2, WIDTH, generator=generator))
    assert torch.isfinite(fit([vectors])["train"].after.true).all()


def test_equal_vectors_are_no_error() -> None:
    """A collapsed model: nothing to find, nothing that is not a number."""
    vectors = vectors_of("train", torch.ones(8, WIDTH), torch.ones(8, WIDTH))
    row = fit([vectors])["train"]
    assert torch.isfinite(row.after.true).all()
    assert row.after.forward.p_at_1 == 0
