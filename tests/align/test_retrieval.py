"""Cosines and ranks against the plainest possible count, and what they must not be fooled by."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tli_engine.align import pairing
from tli_engine.align.retrieval import Alignment, chance_mrr, measure_alignment


@dataclass
class Pairs:
    """Vectors of pairs, equal words having equal vectors."""

    source: Tensor
    target: Tensor
    source_groups: list[int]
    target_groups: list[int]

    def measure(self) -> Alignment:
        return measure_alignment(self.source, self.target, self.source_groups, self.target_groups)

    def reversed(self) -> "Pairs":
        return Pairs(self.target, self.source, self.target_groups, self.source_groups)


def numbered(words: list[int]) -> list[int]:
    """Groups in order of appearance, as the lexicon numbers them."""
    order = {word: i for i, word in enumerate(dict.fromkeys(words))}
    return [order[word] for word in words]


def random_pairs(N: int, vocabulary: int, seed: int, noise: float = 1.0, D: int = 6) -> Pairs:
    """Pairs of random words, many of them repeated, translations somewhat alike."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (
        numbered(torch.randint(0, vocabulary, (N,), generator=generator).tolist()) for _ in range(2)
    )
    source = torch.randn(max(x) + 1, D, generator=generator)
    target = torch.randn(max(y) + 1, D, generator=generator) * noise
    for i, j in zip(x, y, strict=True):
        target[j] += source[i]
    return Pairs(source[x], target[y], x, y)


def distinct_pairs(source: Tensor, target: Tensor) -> Pairs:
    groups = list(range(len(source)))
    return Pairs(source, target, groups, groups)


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    # zeros are like nothing, NaN is like NaN
    return float(a @ b / (a.norm().clamp(min=1e-12) * b.norm().clamp(min=1e-12)))


def naive_ranks(pairs: Pairs, csls: bool = False) -> list[int]:
    """Rank of each pair's target among all distinct target words, counted one by one."""
    # of a word that is there twice, the first
    sources = dict(reversed(list(zip(pairs.source_groups, pairs.source, strict=True))))
    targets = dict(reversed(list(zip(pairs.target_groups, pairs.target, strict=True))))

    def nearest(vector: Tensor, words: dict[int, Tensor]) -> float:
        cosines = [cosine(vector, w) for w in words.values()]
        best = sorted(cosines, reverse=True)[:10]
        # NaN has no order; any makes the mean NaN
        return math.nan if any(map(math.isnan, cosines)) else sum(best) / len(best)

    near_source = {a: nearest(v, targets) if csls else 0 for a, v in sources.items()}
    near_target = {b: nearest(v, sources) if csls else 0 for b, v in targets.items()}

    def score(a: int, b: int) -> float:
        value = cosine(sources[a], targets[b])
        if not csls:
            return value
        # Conneau et al. 2018, eq. 3; the query's own term, the same for all, must break nothing
        own = near_source[a]
        return 2 * value - (0 if math.isnan(own) else own) - near_target[b]

    translations = set(zip(pairs.source_groups, pairs.target_groups, strict=True))
    ranks = []
    for a, b in zip(pairs.source_groups, pairs.target_groups, strict=True):
        true = score(a, b)
        others = [c for c in targets if (a, c) not in translations]
        ranks.append(1 + sum(not score(a, c) < true - 1e-12 for c in others))
    return ranks


def naive_random(pairs: Pairs) -> float:
    values = [
        cosine(pairs.source[i], pairs.target[j])
        for i, j in itertools.product(range(len(pairs.source)), repeat=2)
        if pairs.source_groups[i] != pairs.source_groups[j]
        and pairs.target_groups[i] != pairs.target_groups[j]
    ]
    return sum(values) / len(values) if values else math.nan


@settings(deadline=None, max_examples=30)
@given(N=st.integers(1, 16), vocabulary=st.integers(1, 14), seed=st.integers(0, 2**31))
def test_equals_the_count_on_random_data_with_duplicates(
    N: int, vocabulary: int, seed: int
) -> None:
    pairs = random_pairs(N, vocabulary, seed)
    actual = pairs.measure()
    for direction, way in ((actual.forward, pairs), (actual.reverse, pairs.reversed())):
        ranks = naive_ranks(way)
        assert [round(1 / r) for r in direction.reciprocal_ranks.tolist()] == ranks
        assert direction.hits.tolist() == [r == 1 for r in ranks]
        assert direction.p_at_1 == pytest.approx(ranks.count(1) / N)
        assert direction.mrr == pytest.approx(sum(1 / r for r in ranks) / N)
        assert direction.csls_p_at_1 == pytest.approx(naive_ranks(way, csls=True).count(1) / N)
        assert direction.candidates == len(set(way.target_groups))
    expected = [cosine(a, b) for a, b in zip(pairs.source, pairs.target, strict=True)]
    assert actual.true.tolist() == pytest.approx(expected, abs=1e-12)
    assert actual.cosine_true == pytest.approx(sum(expected) / N, abs=1e-12)
    assert actual.cosine_random == pytest.approx(naive_random(pairs), abs=1e-12, nan_ok=True)


def test_csls_looks_at_ten_neighbours() -> None:
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(300, 4, generator=generator).double()
    y = x + 0.3 * torch.randn(300, 4, generator=generator).double()
    cosines = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(y).T

    def hits(neighbours: int) -> int:
        near_x, near_y = (c.topk(neighbours).values.mean(1) for c in (cosines, cosines.T))
        score = 2 * cosines - near_x[:, None] - near_y
        return int((score.argmax(1) == torch.arange(300)).sum())

    # the data can tell the number
    assert len({hits(n) for n in (8, 9, 10, 11)}) == 4
    forward = distinct_pairs(x, y).measure().forward
    assert round(300 * forward.csls_p_at_1) == hits(10)


def test_csls_ranks_otherwise_than_the_cosine() -> None:
    """A hub near every query wins by cosine, and is discounted by CSLS; 12 words make 10 of it."""
    generator = torch.Generator().manual_seed(0)
    common = torch.zeros(8)
    common[0] = 1
    source = torch.randn(12, 8, generator=generator) * 0.5 + common
    target = source + 0.6 * torch.randn(12, 8, generator=generator)
    target[0] = common
    pairs = distinct_pairs(source, target)
    forward = pairs.measure().forward
    assert forward.csls_p_at_1 == pytest.approx(naive_ranks(pairs, csls=True).count(1) / 12)
    assert forward.csls_p_at_1 > forward.p_at_1


def small_tiles(monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, kept: int = 0) -> None:
    """Tiles of few words, none kept, a few numbers at a time: as for very many words."""
    sizes = {
        "_ROWS": rows,
        "_COLUMNS": columns,
        "_KEPT": kept,
        "_VALUES": 5,
        "_MANY": 1,
        "_GROUP": 2,
    }
    for name, size in sizes.items():
        monkeypatch.setattr(pairing, name, size)


@pytest.mark.parametrize("kept", [0, 1 << 28], ids=["twice", "kept"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 40), (40, 7), (8, 11)])
def test_tiles_change_nothing(
    rows: int, columns: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = random_pairs(40, 25, seed=1)
    whole = pairs.measure()
    small_tiles(monkeypatch, rows, columns, kept)
    tiled = pairs.measure()
    torch.testing.assert_close(tiled.true, whole.true, rtol=0, atol=1e-14)
    assert tiled.cosine_random == pytest.approx(whole.cosine_random, abs=1e-14)
    for ours, theirs in ((tiled.forward, whole.forward), (tiled.reverse, whole.reverse)):
        assert torch.equal(ours.reciprocal_ranks, theirs.reciprocal_ranks)
        assert torch.equal(ours.hits, theirs.hits)
        assert ours.csls_p_at_1 == theirs.csls_p_at_1


@pytest.mark.parametrize("kind", ["ties", "nan", "collapsed", "one-word", "of-any-case"])
@pytest.mark.parametrize("tiled", [False, True], ids=["whole", "tiled"])
def test_equals_the_count_where_it_is_easily_got_wrong(
    kind: str, tiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tiled:
        small_tiles(monkeypatch, 5, 4)
    for seed in range(6):
        pairs = random_pairs(24, 1 if kind == "one-word" else 14, seed, D=3)
        if kind == "ties":
            pairs.source, pairs.target = pairs.source.round(), pairs.target.round()
        elif kind == "nan":
            word = pairs.source_groups[seed]
            pairs.source[torch.tensor(pairs.source_groups) == word] = torch.nan
        elif kind == "collapsed":
            pairs.target[:] = pairs.target[0].clone()
        elif kind == "of-any-case":
            # words that differ in case are one word, of which the first stands for all
            pairs.source = pairs.source + torch.randn(24, 3)
        actual = pairs.measure()
        for direction, way in ((actual.forward, pairs), (actual.reverse, pairs.reversed())):
            ranks = naive_ranks(way)
            assert [round(1 / r) for r in direction.reciprocal_ranks.tolist()] == ranks
            csls_hits = naive_ranks(way, csls=True).count(1)
            assert direction.csls_p_at_1 == pytest.approx(csls_hits / 24)
        expected = naive_random(pairs)
        assert actual.cosine_random == pytest.approx(expected, abs=1e-12, nan_ok=True)
        cosines = [cosine(a, b) for a, b in zip(pairs.source, pairs.target, strict=True)]
        assert actual.true.tolist() == pytest.approx(cosines, abs=1e-12, nan_ok=True)


def test_a_collapsed_space_scores_nothing_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch, 7, 9)
    vectors = torch.randn(33).expand(50, 33)
    collapsed = distinct_pairs(vectors, 3 * vectors).measure()
    for direction in (collapsed.forward, collapsed.reverse):
        assert (direction.p_at_1, direction.csls_p_at_1) == (0, 0)
        assert direction.mrr == pytest.approx(1 / 50)


@pytest.mark.parametrize("columns", [1, 9, 10, 11, 170, 2048, 2100])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_largest_are_found_in_groups(columns: int, transposed: bool) -> None:
    cosine = torch.randn(columns, 6).T if transposed else torch.randn(6, columns)
    # neighbours that lie in one group, in the rest beyond the groups, and that are equal
    cosine[1, : min(columns, 12)] += 5
    cosine[2, -min(columns, 12) :] += 5
    cosine[3] = 1
    cosine[4, columns // 2] = torch.nan
    largest = pairing._largest(cosine)
    expected = cosine.sort(descending=True).values[:, :10]
    assert torch.equal(largest.nan_to_num(9), expected.nan_to_num(9))


def test_the_order_of_pairs_changes_nothing() -> None:
    pairs = random_pairs(30, 20, seed=2)
    order = torch.randperm(30)
    shuffled = Pairs(
        pairs.source[order],
        pairs.target[order],
        *(numbered([g[i] for i in order]) for g in (pairs.source_groups, pairs.target_groups)),
    ).measure()
    whole = pairs.measure()
    assert shuffled.cosine_random == pytest.approx(whole.cosine_random, abs=1e-12)
    for ours, theirs in ((shuffled.forward, whole.forward), (shuffled.reverse, whole.reverse)):
        assert torch.equal(ours.reciprocal_ranks, theirs.reciprocal_ranks[order])
        assert ours.csls_p_at_1 == theirs.csls_p_at_1


def test_both_directions_are_measured() -> None:
    pairs = random_pairs(30, 20, seed=3)
    forward, back = pairs.measure(), pairs.reversed().measure()
    assert forward.reverse.to_json() == back.forward.to_json()
    assert forward.forward.to_json() == back.reverse.to_json()
    assert forward.forward.to_json() != forward.reverse.to_json()
    expected = (forward.forward.reciprocal_ranks + forward.reverse.reciprocal_ranks) / 2
    assert torch.equal(forward.two_way_reciprocal_ranks, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("varied", [False, True], ids=["equal", "of-any-length"])
def test_a_collapsed_space_scores_nothing(varied: bool, dtype: torch.dtype) -> None:
    """Every word alike: cosine 1 for true pairs and for random ones, and no word is found."""
    vector = torch.randn(33)
    factors = 0.1 + 10 * torch.rand(2, 50, 1) if varied else torch.ones(2, 50, 1)
    # a factor that bf16 can apply without rounding
    factors = 2.0 ** factors.log2().round() if dtype == torch.bfloat16 else factors
    source, target = (factors * vector.to(dtype)).to(dtype)
    collapsed = distinct_pairs(source, target).measure()
    assert collapsed.cosine_true == pytest.approx(1, abs=1e-6)
    assert collapsed.cosine_random == pytest.approx(1, abs=1e-6)
    assert collapsed.separation == pytest.approx(0, abs=1e-6)
    for direction in (collapsed.forward, collapsed.reverse):
        assert direction.p_at_1 == 0
        assert direction.csls_p_at_1 == 0
        assert direction.mrr == pytest.approx(1 / 50)


def test_zero_vectors_score_nothing() -> None:
    measured = distinct_pairs(torch.zeros(9, 4), torch.zeros(9, 4)).measure()
    assert (measured.cosine_true, measured.cosine_random) == (0, 0)
    assert measured.forward.p_at_1 == measured.reverse.p_at_1 == 0


@pytest.mark.parametrize("broken", [slice(None), slice(3, 4)], ids=["all", "one"])
def test_vectors_that_are_nan_find_nothing(broken: slice) -> None:
    """A model that overflows must not look as if every word were found."""
    source = torch.randn(9, 4)
    target = source.clone()
    source[broken] = torch.nan
    measured = distinct_pairs(source, target).measure()
    for direction in (measured.forward, measured.reverse):
        assert not direction.hits[broken].any()
    assert measured.forward.mrr < 1


def test_translations_that_are_one_score_one() -> None:
    source = torch.randn(40, 16)
    measured = distinct_pairs(source, source * 3).measure()
    assert measured.cosine_true == pytest.approx(1)
    for direction in (measured.forward, measured.reverse):
        assert (direction.p_at_1, direction.mrr, direction.csls_p_at_1) == (1, 1, 1)


def test_a_tie_with_the_translation_counts_against_it() -> None:
    """Two words of one vector cannot both be told from the other."""
    source = torch.eye(3)
    target = source.clone()
    target[1] = target[0]
    forward = distinct_pairs(source, target).measure().forward
    assert forward.hits.tolist() == [False, False, True]
    assert forward.reciprocal_ranks.tolist() == [0.5, pytest.approx(1 / 3), 1]


def test_other_translations_of_a_word_do_not_count_against_it() -> None:
    """One word, two translations, the second of which lies nearer: both are found."""
    word, other = torch.eye(4)[:2]
    source = torch.stack([word, word, other])
    target = torch.stack([word + 0.4 * other, word, other])
    groups = [0, 0, 1], [0, 1, 2]
    measured = measure_alignment(source, target, *groups)
    assert measured.forward.hits.tolist() == [True, True, True]
    # were they two words that happen to lie there, the farther one would lose
    apart = measure_alignment(source, target, [0, 1, 2], [0, 1, 2])
    assert apart.forward.hits.tolist() == [False, True, True]
    # the second translation is not held against the first in the mean of random pairs either
    expected = [cosine(source[i], target[j]) for i, j in ((0, 2), (1, 2), (2, 0), (2, 1))]
    assert measured.cosine_random == pytest.approx(sum(expected) / 4)


def test_repeating_a_pair_changes_no_rank() -> None:
    pairs = random_pairs(20, 40, seed=4)
    once = pairs.measure()
    rows = [*range(20), 3, 3, 7]
    again = Pairs(
        pairs.source[rows],
        pairs.target[rows],
        *([g[i] for i in rows] for g in (pairs.source_groups, pairs.target_groups)),
    ).measure()
    assert torch.equal(again.forward.reciprocal_ranks[:20], once.forward.reciprocal_ranks)
    assert again.forward.candidates == once.forward.candidates


def test_one_pair_has_no_random_cosine() -> None:
    measured = distinct_pairs(torch.ones(1, 3), torch.ones(1, 3)).measure()
    assert math.isnan(measured.cosine_random)
    assert math.isnan(measured.separation)
    assert measured.forward.p_at_1 == 1


def test_figures_are_fp64_on_the_cpu() -> None:
    measured = random_pairs(5, 9, seed=5).measure()
    assert measured.true.dtype == torch.float64
    assert measured.forward.reciprocal_ranks.dtype == torch.float64
    assert measured.forward.hits.dtype == torch.bool


def test_report_has_the_contracts_keys() -> None:
    report = random_pairs(8, 9, seed=6).measure().to_json()
    three = ["p_at_1", "mrr", "csls_p_at_1"]
    assert list(report) == ["cosine_true", "cosine_random", "separation", *three, "reverse"]
    assert list(report["reverse"]) == three
    assert report["separation"] == report["cosine_true"] - report["cosine_random"]


@pytest.mark.parametrize("candidates", [1, 2, 3, 5])
def test_chance_is_the_mean_over_all_orders(candidates: int) -> None:
    orders = list(itertools.permutations(range(candidates)))
    expected = sum(1 / (1 + order.index(0)) for order in orders) / len(orders)
    assert chance_mrr(candidates) == pytest.approx(expected)


def test_random_vectors_score_chance() -> None:
    measured = distinct_pairs(torch.randn(400, 64), torch.randn(400, 64)).measure()
    for direction in (measured.forward, measured.reverse):
        assert direction.mrr == pytest.approx(chance_mrr(400), abs=0.015)
    assert measured.cosine_random == pytest.approx(0, abs=0.01)
