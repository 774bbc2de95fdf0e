import pytest
import torch
from torch import Tensor

from tli_engine.align.space import LanguageMap, fit_space
from tli_engine.config import Space

SHRINKAGE = 0.5
COUNTS = [
    pytest.param(200, id="more-words-than-dimensions"),
    pytest.param(6, id="fewer-words-than-dimensions"),
]


def words(count: int, D: int = 12) -> tuple[Tensor, Tensor]:
    """Two languages with a mean and a covariance of their own."""
    return (
        torch.randn(count, D) @ torch.randn(D, D) + 3,
        torch.randn(count, D) @ torch.randn(D, D) * 0.1 - 1,
    )


def covariance(x: Tensor) -> Tensor:
    centred = x.double() - x.double().mean(0)
    return centred.T @ centred / len(x)


def matrix_of(fitted: LanguageMap) -> Tensor:
    """The linear part of a whitening map, built whole."""
    assert fitted.zca is not None
    return fitted.zca(torch.eye(fitted.zca.basis.shape[0], dtype=torch.float64))


def test_whitening_equals_the_dense_formula() -> None:
    """Inverse square root of the shrunk covariance, by its definition."""
    for count in (200, 6):
        source, target = (v.double() for v in words(count))
        shrunk = torch.lerp(
            covariance(source), covariance(source).diagonal().mean() * torch.eye(12).double(), 0.5
        )
        values, basis = torch.linalg.eigh(shrunk)
        dense = basis @ values.rsqrt().diag() @ basis.T
        torch.testing.assert_close(
            matrix_of(fit_space("whitened", source, target).source), dense, rtol=1e-8, atol=1e-10
        )


def test_raw_leaves_vectors_alone() -> None:
    source, target = words(5)
    space = fit_space("raw", source, target)
    assert space.source(source) is source
    assert space.target(target) is target


@pytest.mark.parametrize("count", COUNTS)
def test_centred_vectors_have_mean_zero_in_either_language(count: int) -> None:
    source, target = words(count)
    space = fit_space("centred", source, target)
    for mapped, plain in ((space.source(source), source), (space.target(target), target)):
        assert mapped.mean(0).abs().max() < 1e-5
        torch.testing.assert_close(mapped, plain - plain.mean(0), rtol=0, atol=1e-5)
    # the maps are not exchanged
    assert space.source(target).mean(0).abs().min() > 1


@pytest.mark.parametrize("count", COUNTS)
def test_whitened_vectors_have_the_covariance_that_shrinkage_implies(count: int) -> None:
    r"""A direction of variance v gets v / (v/2 + m/2), m being the mean variance."""
    source, target = (v.double() for v in words(count))
    space = fit_space("whitened", source, target)
    for mapped, plain in ((space.source(source), source), (space.target(target), target)):
        variances, directions = torch.linalg.eigh(covariance(plain))
        shrunk = (1 - SHRINKAGE) * variances + SHRINKAGE * variances.mean()
        expected = directions * (variances / shrunk) @ directions.T
        torch.testing.assert_close(covariance(mapped), expected, rtol=0, atol=1e-10)
        assert mapped.mean(0).abs().max() < 1e-10


def test_whitening_turns_nothing() -> None:
    """ZCA: the matrix is symmetric, and the identity where all directions vary alike."""
    source, target = words(50)
    matrix = matrix_of(fit_space("whitened", source, target).source)
    torch.testing.assert_close(matrix, matrix.T)
    # orthonormal columns of mean zero: the covariance is exactly isotropic
    even = torch.cat([torch.eye(4), -torch.eye(4)]).double() * 2
    matrix = matrix_of(fit_space("whitened", even, even).source)
    torch.testing.assert_close(matrix, torch.eye(4, dtype=torch.float64))


def test_whitening_is_blind_to_scale() -> None:
    source, target = words(30)
    small, large = (fit_space("whitened", source * s, target).source(source * s) for s in (1, 1e3))
    torch.testing.assert_close(small, large, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("space", ["centred", "whitened"])
def test_the_map_of_the_fitting_words_serves_others(space: Space) -> None:
    source, target = (v.double() for v in words(40))
    fitted = fit_space(space, source[:30], target[:30])
    others = source[30:] - source[:30].mean(0)
    expected = others if fitted.source.zca is None else others @ matrix_of(fitted.source)
    torch.testing.assert_close(fitted.source(source[30:]), expected)


@pytest.mark.parametrize("space", ["raw", "centred", "whitened"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_mapped_vectors_keep_their_dtype(space: Space, dtype: torch.dtype) -> None:
    source, target = words(10)
    assert fit_space(space, source, target).source(source.to(dtype)).dtype == dtype


@pytest.mark.parametrize("space", ["raw", "centred", "whitened"])
def test_one_word_is_enough_not_to_fail(space: Space) -> None:
    source, target = words(1)
    mapped = fit_space(space, source, target).source(source)
    assert torch.isfinite(mapped).all()


def test_the_fit_is_no_part_of_the_gradient() -> None:
    source, target = (v.double().requires_grad_() for v in words(20))
    space = fit_space("whitened", source, target)
    assert space.source.mean is not None
    assert not space.source.mean.requires_grad
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(space.source, (x,))
