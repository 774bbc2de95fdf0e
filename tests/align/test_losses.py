import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tli_engine.align.losses import alignment_loss
from tli_engine.align.objective import batch_loss, pair_batch
from tli_engine.align.space import LanguageMap, PairSpace
from tli_engine.config import AlignConfig, Loss
from tli_engine.models.early import EarlyModel
from tli_engine.testing import random_words

LOSSES: list[Loss] = ["triplet-hardest", "triplet-semihard", "infonce"]


def config(loss: Loss, two_way: bool = False, **values: Any) -> AlignConfig:
    return AlignConfig(loss=loss, two_way=two_way, **values)


def make_inputs(N: int, seed: int = 0, share: float = 0.8) -> tuple[Tensor, Tensor]:
    """Cosines with true pairs somewhat closer, and negatives that are not all of the rest."""
    generator = torch.Generator().manual_seed(seed)
    cosine = torch.rand(N, N, generator=generator, dtype=torch.float64) * 2 - 1
    cosine.diagonal().add_(0.3)
    is_negative = torch.rand(N, N, generator=generator) < share
    return cosine, is_negative & ~torch.eye(N, dtype=torch.bool)


def naive(cosine: Tensor, is_negative: Tensor, config: AlignConfig) -> float:
    """Row by row, number by number."""
    losses = []
    for i, row in enumerate(cosine.tolist()):
        positive = row[i]
        negatives = [c for c, n in zip(row, is_negative[i].tolist(), strict=True) if n]
        if config.loss == "infonce":
            weights = [math.exp(c / config.temperature) for c in (positive, *negatives)]
            losses.append(-math.log(weights[0] / sum(weights)))
            continue
        if config.loss == "triplet-semihard":
            # Schroff et al. 2015: farther than the positive, yet within the margin
            negatives = [c for c in negatives if positive - config.margin < c < positive]
        # no triplet, no loss
        hardest = max(negatives, default=-math.inf)
        losses.append(max(0.0, config.margin + hardest - positive))
    return sum(losses) / len(losses)


@settings(deadline=None)
@given(
    N=st.integers(1, 7),
    seed=st.integers(0, 2**31),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    loss=st.sampled_from(LOSSES),
    margin=st.floats(0.05, 1),
)
def test_equals_a_loop(N: int, seed: int, share: float, loss: Loss, margin: float) -> None:
    cosine, is_negative = make_inputs(N, seed, share)
    one_way = config(loss, margin=margin, temperature=0.1)
    actual = alignment_loss(cosine, is_negative, one_way).item()
    assert actual == pytest.approx(naive(cosine, is_negative, one_way), abs=1e-12)
    two_way = config(loss, two_way=True, margin=margin, temperature=0.1)
    both = naive(cosine, is_negative, one_way) + naive(cosine.T, is_negative.T, one_way)
    actual = alignment_loss(cosine, is_negative, two_way).item()
    assert actual == pytest.approx(both / 2, abs=1e-12)


def test_hardest_is_the_published_formula() -> None:
    """relu(margin + hardest - positive).mean(), over the whole batch, one way."""
    cosine, _ = make_inputs(8)
    eye = torch.eye(8, dtype=torch.bool)
    hardest = cosine.masked_fill(eye, -torch.inf).max(dim=1).values
    expected = torch.relu(0.4 + hardest - cosine.diagonal()).mean()
    actual = alignment_loss(cosine, ~eye, config("triplet-hardest", margin=0.4))
    assert torch.equal(actual, expected)


def test_infonce_is_cross_entropy_on_the_diagonal() -> None:
    cosine, _ = make_inputs(8)
    eye = torch.eye(8, dtype=torch.bool)
    expected = torch.nn.functional.cross_entropy(cosine / 0.05, torch.arange(8))
    actual = alignment_loss(cosine, ~eye, config("infonce", temperature=0.05))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("negative", "expected"),
    [
        pytest.param(0.7, 0.0, id="closer-than-the-positive-is-too-hard"),
        pytest.param(0.6, 0.0, id="as-close-as-the-positive-is-too-hard"),
        pytest.param(0.5, 0.3, id="within-the-margin"),
        pytest.param(0.1, 0.0, id="beyond-the-margin"),
    ],
)
def test_semihard_negatives_lie_between_positive_and_margin(
    negative: float, expected: float
) -> None:
    cosine = torch.tensor([[0.6, negative], [-1.0, 0.6]], dtype=torch.float64)
    is_negative = torch.tensor([[False, True], [False, False]])
    loss = alignment_loss(cosine, is_negative, config("triplet-semihard", margin=0.4))
    # the second row has no negative, and counts
    assert loss.item() == pytest.approx(expected / 2, abs=1e-12)


@pytest.mark.parametrize("two_way", [False, True], ids=["one-way", "two-way"])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient(loss: Loss, two_way: bool) -> None:
    cosine, is_negative = make_inputs(5, seed=3, share=0.7)
    is_negative[2] = False
    assert torch.autograd.gradcheck(
        lambda c: alignment_loss(c, is_negative, config(loss, two_way, temperature=0.2)),
        cosine.requires_grad_(),
    )


@pytest.mark.parametrize("N", [1, 2, 5])
@pytest.mark.parametrize("two_way", [False, True], ids=["one-way", "two-way"])
@pytest.mark.parametrize("loss", LOSSES)
def test_without_negatives_there_is_no_loss_and_no_gradient(
    loss: Loss, two_way: bool, N: int
) -> None:
    cosine, _ = make_inputs(N)
    is_negative = torch.zeros(N, N, dtype=torch.bool)
    value = alignment_loss(cosine.requires_grad_(), is_negative, config(loss, two_way))
    assert value.item() == 0
    (gradient,) = torch.autograd.grad(value, cosine)
    assert (gradient == 0).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_no_negative_has_no_influence(loss: Loss) -> None:
    cosine, is_negative = make_inputs(6, share=0.5)
    masked = ~is_negative & ~torch.eye(6, dtype=torch.bool)
    assert masked.any()
    spoilt = cosine.masked_fill(masked, torch.nan).requires_grad_()
    value = alignment_loss(spoilt, is_negative, config(loss))
    assert torch.equal(value, alignment_loss(cosine, is_negative, config(loss)))
    (gradient,) = torch.autograd.grad(value, spoilt)
    assert (gradient[masked] == 0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_two_way_treats_both_languages_alike(loss: Loss) -> None:
    cosine, is_negative = make_inputs(6)
    forth, back = (
        [alignment_loss(c, n, config(loss, two_way)).item() for two_way in (True, False)]
        for c, n in ((cosine, is_negative), (cosine.T, is_negative.T))
    )
    assert forth[0] == pytest.approx(back[0], abs=1e-14)
    assert forth[1] != pytest.approx(back[1], abs=1e-3)


@pytest.mark.parametrize("loss", LOSSES)
def test_perfect_separation_costs_nothing(loss: Loss) -> None:
    cosine = 2 * torch.eye(4, dtype=torch.float64) - 1
    is_negative = ~torch.eye(4, dtype=torch.bool)
    assert alignment_loss(cosine, is_negative, config(loss)).item() < 1e-15


@pytest.mark.parametrize("loss", LOSSES)
def test_a_collapsed_space_costs_what_it_should(loss: Loss) -> None:
    """All words alike: the hardest triplet pays its margin, InfoNCE the logarithm of N."""
    cosine = torch.ones(8, 8, dtype=torch.float64)
    value = alignment_loss(cosine, ~torch.eye(8, dtype=torch.bool), config(loss)).item()
    expected = {"triplet-hardest": 0.4, "triplet-semihard": 0.0, "infonce": math.log(8)}[loss]
    assert value == pytest.approx(expected, abs=1e-12)


def test_extreme_temperatures_stay_finite() -> None:
    cosine, is_negative = make_inputs(6)
    for temperature in (1e-4, 1e4):
        value = alignment_loss(
            cosine.float().requires_grad_(), is_negative, config("infonce", temperature=temperature)
        )
        assert value.isfinite()


GROUPS = ([0, 1, 0, 2], [0, 1, 2, 1])


def test_pairs_that_share_a_word_are_no_negatives() -> None:
    source, target = random_words(4, 3, seed=1), random_words(4, 3, seed=2)
    batch = pair_batch(source, target, *GROUPS, mask_duplicates=True)
    # sources 0 and 2 are one word, targets 1 and 3 are one word
    same = {(0, 0), (1, 1), (2, 2), (3, 3), (0, 2), (2, 0), (1, 3), (3, 1)}
    expected = [[(i, j) not in same for j in range(4)] for i in range(4)]
    assert batch.is_negative.tolist() == expected
    # sources first, then targets
    assert batch.words.words == 8
    ids = [t for word in (*source, *target) for t in word.input_ids]
    assert batch.words.input_ids.tolist() == ids


def test_the_published_batches_take_duplicates_for_negatives() -> None:
    words = random_words(4, 3)
    batch = pair_batch(words, words, *GROUPS, mask_duplicates=False)
    assert torch.equal(batch.is_negative, ~torch.eye(4, dtype=torch.bool))


def vectors(model: EarlyModel, words: list[Any], layer: int) -> Tensor:
    """Mean of the content tokens, a word at a time."""
    from tli_engine.data.words import pack

    rows = []
    for word in words:
        hidden = model(pack([word]), layer)
        rows.append(hidden[list(word.content)].mean(0))
    return torch.stack(rows)


@pytest.mark.parametrize("space", ["raw", "centred"])
def test_loss_of_a_batch_is_that_of_its_words(space: Any, model: EarlyModel) -> None:
    source, target = random_words(4, 5, seed=1), random_words(4, 7, seed=2)
    batch = pair_batch(source, target, *GROUPS, mask_duplicates=True)
    align = config("triplet-hardest", layer=2, space=space)
    x, y = (vectors(model, words, 2) for words in (source, target))
    means = (x.mean(0) + 1, y.mean(0)) if space == "centred" else (None, None)
    maps = PairSpace(*(LanguageMap(mean, None) for mean in means))

    result = batch_loss(model, batch, maps, align)

    def cosines(x: Tensor, y: Tensor) -> Tensor:
        return torch.cosine_similarity(x[:, None], y[None], dim=-1)

    expected = alignment_loss(cosines(maps.source(x), maps.target(y)), batch.is_negative, align)
    torch.testing.assert_close(result.loss, expected, rtol=0, atol=1e-5)
    # what is reported is raw, whatever space the loss is in
    raw = cosines(x, y)
    torch.testing.assert_close(result.cosine_true, raw.diagonal().mean(), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        result.cosine_random, raw[batch.is_negative].mean(), rtol=0, atol=1e-5
    )
