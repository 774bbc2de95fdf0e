"""A layer is proposed when it is more than noise, and an artefact is called one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tli_engine.align.retrieval import Alignment, chance_mrr, measure_alignment
from tli_engine.align.scan import _warnings, propose_layer, resamples_for, scan
from tli_engine.config import Pooling
from tli_engine.data.pairs import PairList
from tli_engine.data.words import Word
from tli_engine.models.early import EarlyModel
from tli_engine.testing import random_words

Measured = Callable[..., Alignment]
LAYERS = 13


def random_ranks(pairs: int, generator: torch.Generator, hits: float = 0.0) -> Tensor:
    """Ranks of a random order, a share of them being 1."""
    ranks = torch.randint(1, pairs + 1, (pairs,), generator=generator)
    return ranks.where(torch.rand(pairs, generator=generator) >= hits, torch.ones_like(ranks))


def layers_of(measured: Measured, pairs: int, seed: int, hits: list[float]) -> list[Alignment]:
    generator = torch.Generator().manual_seed(seed)
    return [measured(*(random_ranks(pairs, generator, h) for _ in range(2))) for h in hits]


@pytest.mark.parametrize("pairs", [2, 5, 20, 100])
def test_noise_is_not_proposed(pairs: int, measured: Measured) -> None:
    seeds = 150
    found = [
        propose_layer(layers_of(measured, pairs, seed, [0.0] * LAYERS)).layer is not None
        for seed in range(seeds)
    ]
    assert sum(found) / seeds < 0.1


def test_noise_is_not_proposed_from_vectors_either() -> None:
    def noise(seed: int) -> list[Alignment]:
        generator = torch.Generator().manual_seed(seed)
        groups = list(range(30))
        return [
            measure_alignment(*torch.randn(2, 30, 8, generator=generator), groups, groups)
            for _ in range(6)
        ]

    found = [propose_layer(noise(seed)).layer is not None for seed in range(40)]
    assert sum(found) / len(found) < 0.1


@pytest.mark.parametrize("best", [1, 4, LAYERS - 1])
def test_a_signal_is_proposed_where_it_is(best: int, measured: Measured) -> None:
    hits = [0.05] * LAYERS
    hits[best] = 0.4
    for seed in range(20):
        layers = layers_of(measured, 100, seed, hits)
        proposal = propose_layer(layers)
        assert proposal.layer == proposal.best == best
        low, high = proposal.interval
        mean = float(layers[best].two_way_reciprocal_ranks.mean())
        assert proposal.chance < low < mean < high
        assert f"highest at layer {best}: {mean:.4f}" in proposal.reason
        assert "no layer" not in proposal.reason


def test_layer_0_is_never_proposed(measured: Measured) -> None:
    """Embeddings of shared spelling: nothing that training early blocks could need."""
    for seed in range(20):
        proposal = propose_layer(layers_of(measured, 100, seed, [0.6, *[0.1] * 6]))
        assert proposal.layer is None
        assert proposal.best == 0
        assert proposal.reason.endswith("; not above both, so no layer is proposed")


def test_a_layer_must_beat_layer_0_not_chance_alone(measured: Measured) -> None:
    for seed in range(20):
        same = measured(*(random_ranks(100, torch.Generator().manual_seed(seed), 0.4),) * 2)
        ranks = same.forward.reciprocal_ranks.reciprocal().round().long()
        # one pair better: above layer 0, and by no more than noise
        ranks[ranks.argmax()] = 1
        proposal = propose_layer([same, measured(ranks, ranks)])
        assert proposal.best == 1
        assert proposal.interval[0] > proposal.chance
        assert proposal.layer is None


def test_few_pairs_tell_nothing_however_good(measured: Measured) -> None:
    perfect, bad = torch.ones(19).long(), torch.full((19,), 19)
    proposal = propose_layer([measured(bad, bad), measured(perfect, perfect)])
    assert proposal.layer is None
    assert proposal.reason.endswith("; 19 pairs cannot tell it from noise, 20 might")
    perfect, bad = torch.ones(20).long(), torch.full((20,), 20)
    assert propose_layer([measured(bad, bad), measured(perfect, perfect)]).layer == 1


def test_the_interval_is_corrected_for_the_number_of_layers(measured: Measured) -> None:
    def width(layers: int) -> float:
        low, high = propose_layer(
            layers_of(measured, 100, 0, [0.9, *[0.1] * (layers - 1)])
        ).interval
        return high - low

    assert width(30) > 1.2 * width(2)


def test_a_proposal_is_reproducible(measured: Measured) -> None:
    layers = layers_of(measured, 50, 0, [0.1, 0.4, 0.2])
    assert propose_layer(layers) == propose_layer(layers)
    pairs = len(layers[0].true)
    other = propose_layer(layers, resamples_for(pairs, len(layers), seed=1))
    assert other.interval != propose_layer(layers).interval


def test_chance_is_that_of_both_directions(measured: Measured) -> None:
    forward, reverse = torch.ones(30).long(), torch.ones(30).long()
    layer = measured(forward, reverse)
    object.__setattr__(layer.reverse, "candidates", 7)
    expected = (chance_mrr(30) + chance_mrr(7)) / 2
    assert propose_layer([layer, layer]).chance == pytest.approx(expected)


def warnings_of(measured: Measured, true: float, random: float) -> list[str]:
    ranks = torch.arange(1, 31)
    layers = [measured(ranks, ranks), measured(ranks, ranks, true, random)]
    hit = torch.ones(30).long()
    layers.append(measured(hit, hit, 0.6, 0.1))
    return _warnings(layers, propose_layer(layers))


def test_a_high_cosine_of_random_pairs_is_called_an_artefact(measured: Measured) -> None:
    (warning,) = warnings_of(measured, true=0.99998, random=0.99985)
    assert warning == (
        "layer 1's cosine of 0.99998 is an artefact: random pairs have 0.99985, and the "
        "translation comes first for 3.3% of the words; leave the first token out of the pooling "
        "(--prefix, --pooling content)"
    )


@pytest.mark.parametrize(("true", "random"), [(0.99, 0.5), (0.9, 0.899), (0.6, 0.1)])
def test_a_cosine_that_means_something_is_not(
    true: float, random: float, measured: Measured
) -> None:
    assert warnings_of(measured, true, random) == []


def test_no_proposal_is_a_warning(measured: Measured) -> None:
    layers = layers_of(measured, 50, 0, [0.5, 0.1])
    (warning,) = _warnings(layers, propose_layer(layers))
    assert warning.startswith(
        "no layer is proposed: with content pooling, two-way MRR is highest at layer 0"
    )


PAIRS = 24


def scan_tiny(model: EarlyModel, pooling: Pooling, advanced: list[int] | None = None) -> Any:
    words: list[list[Word]] = [random_words(PAIRS, 6, seed=s) for s in (1, 2)]
    # one source word is there twice
    words[0][5] = words[0][4]
    texts = [[str(w.input_ids) for w in side] for side in words]
    pairs = PairList(("sw", "en"), tuple(texts[0]), tuple(texts[1]))
    advance = (advanced if advanced is not None else []).append
    return scan(model, "tiny", pairs, *words, pooling, advance)


def test_a_scan_measures_every_layer(model: EarlyModel) -> None:
    advanced: list[int] = []
    result = scan_tiny(model, "content", advanced)
    assert len(result.layers) == model.depth + 1 == 4
    assert sum(advanced) == (2 * PAIRS - 1) * 4
    report = result.to_json()
    assert [row["layer"] for row in report["layers"]] == [0, 1, 2, 3]
    assert {"cosine_true", "cosine_random", "p_at_1", "reverse"} <= report["layers"][0].keys()
    assert (report["model"], report["pooling"], report["pairs"]) == ("tiny", "content", PAIRS)
    assert report["seconds"] > 0
    # random weights know no translations
    assert report["proposed_layer"] is None
    assert report["proposal"]["reason"] == result.proposal.reason
    assert report["warnings"] == result.warnings != []


@pytest.mark.parametrize("pooling", ["paper", "last", "weighted"])
def test_the_proposal_is_by_content_pooling_whatever_is_shown(
    pooling: Pooling, model: EarlyModel
) -> None:
    shown, content = scan_tiny(model, pooling), scan_tiny(model, "content")
    assert shown.proposal == content.proposal
    assert shown.layers[2].cosine_true != content.layers[2].cosine_true


def test_a_first_token_of_massive_activation_is_an_artefact(model: EarlyModel) -> None:
    """What the published pilot measured: pooled with it, all words are alike."""
    embedding = model.decoder.embed_tokens
    weight = embedding.weight.clone()
    weight[256] = 1e3
    embedding.weight = torch.nn.Parameter(weight, requires_grad=False)
    paper, content = scan_tiny(model, "paper"), scan_tiny(model, "content")
    assert any("is an artefact: random pairs have" in w for w in paper.warnings)
    assert min(paper.layers[0].cosine_true, paper.layers[0].cosine_random) > 0.99
    assert not any("artefact" in w for w in content.warnings)
