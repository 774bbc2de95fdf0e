"""The space in which vectors are compared: raw, centred or whitened per language."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tli_engine.config import Space

# share of the isotropic covariance mixed in before inversion: words are fewer than dimensions
_SHRINKAGE = 0.5


# eigenvalues below this share of the largest are rounding of zero
_RANK_TOLERANCE = 1e-12
# variance of vectors that are all equal, whose inverse square root is still an fp32 number
_SMALLEST = 1e-30


@dataclass(frozen=True)
class ZCA:
    r"""A symmetric map that acts on few directions: :math:`x \mapsto a\,x + x\,U\,(B - a)\,U^T`.

    Attributes:
        rest: Gain *a* of every direction outside ``basis``.
        basis: Orthonormal directions *U*, ``[D, R]``.
        gains: Gain of each of them, the diagonal of *B*, ``[R]``.
    """

    rest: Tensor
    basis: Tensor
    gains: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Map vectors, ``[N, D]``; ``[D, D]`` is never built, which at D = 8192 takes 0.5 GB."""
        rest, basis, gains = (t.to(x.dtype) for t in (self.rest, self.basis, self.gains))
        return rest * x + ((x @ basis) * (gains - rest)) @ basis.T


@dataclass(frozen=True)
class LanguageMap:
    """Affine map of one language's vectors: less ``mean``, through ``zca``; ``None`` is no such."""

    mean: Tensor | None
    zca: ZCA | None

    def to(self, dtype: torch.dtype) -> "LanguageMap":
        """The same map in another dtype."""
        zca = self.zca and ZCA(
            *(t.to(dtype) for t in (self.zca.rest, self.zca.basis, self.zca.gains))
        )
        return LanguageMap(None if self.mean is None else self.mean.to(dtype), zca)

    def __call__(self, x: Tensor) -> Tensor:
        """Map vectors, ``[N, D]``."""
        if self.mean is not None:
            x = x - self.mean.to(x.dtype)
        return x if self.zca is None else self.zca(x)


@dataclass(frozen=True)
class PairSpace:
    """One map for each language of a pair."""

    source: LanguageMap
    target: LanguageMap

    def to(self, dtype: torch.dtype) -> "PairSpace":
        """The same maps in another dtype, for many uses."""
        return PairSpace(self.source.to(dtype), self.target.to(dtype))

    def __call__(self, vectors: Tensor) -> Tensor:
        """Map N sources, then N targets, ``[2 N, D]``."""
        source, target = vectors.chunk(2)
        return torch.cat([self.source(source), self.target(target)])


def fit_space(space: Space, source: Tensor, target: Tensor) -> PairSpace:
    """Fit the maps on the base model's vectors of the training words, once.

    Args:
        space: ``raw`` (no map), ``centred`` (each language's mean removed) or ``whitened`` (also
            its covariance, by ZCA shrunk half-way to the isotropic one).
        source: Vectors of the first language's distinct words, ``[N, D]``.
        target: Vectors of the second language's distinct words, ``[M, D]``.
    """
    return PairSpace(_fit(space, source), _fit(space, target))


def _fit(space: Space, vectors: Tensor) -> LanguageMap:
    if space == "raw":
        return LanguageMap(None, None)
    x = vectors.detach().double()
    mean = x.mean(0)
    if space == "centred":
        return LanguageMap(mean, None)
    return LanguageMap(mean, _shrunk_zca(x - mean))


def _shrunk_zca(centred: Tensor) -> ZCA:
    """Inverse square root of the covariance shrunk to the isotropic one of the same trace.

    The covariance has no more directions than there are words, so that for few words in many
    dimensions its eigenvectors come from the words' Gram matrix; the result is the same.
    """
    words, width = centred.shape
    isotropic = centred.square().sum() / words / width
    if words < width:
        values, left = torch.linalg.eigh(centred @ centred.T / words)
        kept = values > _RANK_TOLERANCE * values[-1]
        values = values[kept]
        basis = centred.T @ left[:, kept] / (words * values).sqrt()
    else:
        values, basis = torch.linalg.eigh(centred.T @ centred / words)
    shrunk = torch.lerp(values, isotropic, _SHRINKAGE)
    rest = (_SHRINKAGE * isotropic).clamp(min=_SMALLEST).rsqrt()
    return ZCA(rest, basis, shrunk.clamp(min=_SMALLEST).rsqrt())
