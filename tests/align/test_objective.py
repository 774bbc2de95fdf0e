"""A pack's loss in any space is that of its matrix of cosines, which it does not hold."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tli_engine.align.losses import alignment_loss
from tli_engine.align.objective import BatchLoss, negatives, pack_loss, vectors_loss
from tli_engine.align.space import PairSpace, fit_space
from tli_engine.config import AlignConfig, Loss, Space
from tli_engine.ops import cosine_similarity, segment_mean
from tli_engine.testing import assert_within_error_budget

# the module, not the function that hides it
op = importlib.import_module("tli_engine.ops.pooled_alignment_loss")
SPACES: list[Space] = ["raw", "centred", "whitened"]
LOSSES: list[Loss] = ["infonce", "triplet-hardest", "triplet-semihard"]
D = 12
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def make_inputs(N: int, dtype: torch.dtype) -> Inputs:
    """Words of 1 to 4 rows, not around zero; pairs have something in common, some share a word."""
    lengths = torch.randint(1, 5, (2 * N,))
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    common = torch.randn(N, D).repeat(2, 1)[torch.repeat_interleave(torch.arange(2 * N), lengths)]
    hidden = 1 + common + torch.randn(len(common), D)
    i = torch.arange(N)
    groups = torch.stack([i.where(i % 3 > 0, 0), i.where(i % 4 > 0, 0)])
    return hidden.to(dtype), torch.rand(len(hidden)) + 0.1, offsets, groups


def make_space(space: Space, dtype: torch.dtype) -> PairSpace:
    """Fitted on other words, more of them than dimensions or fewer."""
    return fit_space(space, 1 + torch.randn(20, D), torch.randn(8, D) - 1).to(dtype)


def with_matrix(
    hidden: Tensor, weight: Tensor, offsets: Tensor, groups: Tensor, space: PairSpace,
    config: AlignConfig,
) -> BatchLoss:  # fmt: skip
    """The same from matrices of cosines and a mask."""
    source, target = segment_mean(hidden, weight, offsets).chunk(2)
    cosine = cosine_similarity(space.source(source), space.target(target))
    negative = negatives(groups, config.mask_duplicates)
    raw = cosine_similarity(source.detach(), target.detach())
    loss = alignment_loss(cosine, negative, config)
    return BatchLoss(loss, raw.diagonal().mean(), raw[negative].mean())


def with_gradient(
    function: Callable[..., BatchLoss], hidden: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    leaf = hidden.detach().requires_grad_()
    found = function(leaf, *args)
    (gradient,) = torch.autograd.grad(found.loss, leaf)
    return found.loss.detach(), found.cosine_true, found.cosine_random, gradient


@contextmanager
def tiles_of(cosines: int) -> Iterator[None]:
    """At most so many cosines at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "_MOST_COSINES", cosines)
        yield


@pytest.mark.parametrize("mask_duplicates", [False, True], ids=["all", "groups"])
@pytest.mark.parametrize("two_way", [False, True], ids=["one-way", "two-way"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("space", SPACES)
def test_equals_the_loss_of_the_matrix(
    space: Space, loss: Loss, two_way: bool, mask_duplicates: bool
) -> None:
    config = AlignConfig(space=space, loss=loss, two_way=two_way, mask_duplicates=mask_duplicates)
    maps = make_space(space, torch.float64)
    for N in (1, 2, 9):
        inputs = make_inputs(N, torch.float64)
        expected = with_gradient(with_matrix, *inputs, maps, config)
        for cosines in (1 << 24, 2 * N):
            with tiles_of(cosines):
                actual = with_gradient(pack_loss, *inputs, maps, config)
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("space", SPACES)
def test_errs_no_more_than_the_matrix(space: Space, loss: Loss, dtype: torch.dtype) -> None:
    inputs, maps = make_inputs(24, dtype), make_space(space, torch.float32)
    config = AlignConfig(space=space, loss=loss)
    exact = with_gradient(with_matrix, inputs[0].double(), *inputs[1:], maps, config)
    plain = with_gradient(with_matrix, *inputs, maps, config)
    for cosines in (1 << 24, 5 * 24):
        with tiles_of(cosines):
            actual = with_gradient(pack_loss, *inputs, maps, config)
        assert [x.dtype for x in actual] == [torch.float32] * 3 + [dtype]
        for got, same, truth in zip(actual, plain, exact, strict=True):
            assert_within_error_budget(got, same, truth, floor=2e-6)


# the raw space's is the op's own
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("space", SPACES[1:])
def test_gradient(space: Space, loss: Loss) -> None:
    hidden, weight, offsets, groups = make_inputs(3, torch.float64)
    maps = make_space(space, torch.float64)
    config = AlignConfig(space=space, loss=loss, temperature=0.2)
    for cosines in (1 << 24, 6):
        with tiles_of(cosines):
            assert torch.autograd.gradcheck(
                lambda x: pack_loss(x, weight, offsets, groups, maps, config).loss,
                hidden.requires_grad_(),
            )


@pytest.mark.parametrize("space", SPACES)
def test_vectors_stand_for_their_words(space: Space) -> None:
    """Ranks and parts of a batch give vectors, which a batch alone makes itself."""
    hidden, weight, offsets, groups = make_inputs(7, torch.float64)
    maps, config = make_space(space, torch.float64), AlignConfig(space=space)
    expected = with_gradient(pack_loss, hidden, weight, offsets, groups, maps, config)

    def from_vectors(rows: Tensor) -> BatchLoss:
        return vectors_loss(segment_mean(rows, weight, offsets), groups, maps, config)

    torch.testing.assert_close(with_gradient(from_vectors, hidden), expected)


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What is computed, the insides of the loss included, and how many numbers it makes at once."""

    def __init__(self, inside: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self.largest = 0
        forward, backward = (
            getattr(torch.ops.tli_engine, name).default
            for name in ("pooled_alignment_loss", "pooled_alignment_loss_backward")
        )
        plain = {forward: op._reference, backward: op._reference_backward}
        self._inside = plain if inside else {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._inside:
            with self:
                return self._inside[func](*args)
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, Tensor):
                self.largest = max(self.largest, result.numel())
        if not func.is_view:
            self.names.append(func.name())
        return results


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("space", SPACES)
def test_no_matrix_of_all_pairs_is_made(space: Space, loss: Loss) -> None:
    """Neither of cosines nor of masks, forward or backward, where they are too many."""
    N = 200
    inputs, maps = make_inputs(N, torch.float32), make_space(space, torch.float32)
    config = AlignConfig(space=space, loss=loss)
    expected = with_gradient(with_matrix, *inputs, maps, config)
    with Operations(inside=True) as matrix:
        with_gradient(with_matrix, *inputs, maps, config)
    assert matrix.largest >= N * N
    with tiles_of(32 * N), Operations(inside=True) as tiles:
        actual = with_gradient(pack_loss, *inputs, maps, config)
    # rows of all words, or a tile with the masks of both languages
    assert max(len(inputs[0]) * D, 32 * N) <= tiles.largest <= 2 * 32 * N < N * N
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("space", "most"), [("raw", 2), ("centred", 12), ("whitened", 34)])
def test_a_small_batch_takes_few_operations(space: Space, most: int) -> None:
    inputs, maps = make_inputs(8, torch.float32), make_space(space, torch.float32)
    hidden, one = inputs[0].requires_grad_(), torch.ones(())
    with Operations(inside=False) as launched:
        found = pack_loss(hidden, *inputs[1:], maps, AlignConfig(space=space))
        torch.autograd.grad(found.loss, hidden, one)
    assert len(launched.names) <= most, launched.names
