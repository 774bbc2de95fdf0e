"""The space in which vectors are compared: raw, centred or whitened per language."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tli_engine.config import Space

# share of the isotropic covariance mixed in before inversion: words are fewer than dimensions
_SHRINKAGE = 0.5


@dataclass(frozen=True)
class LanguageMap:
    """Affine map of one language's vectors: ``(x - mean) @ matrix``; ``None`` leaves a part out."""

    mean: Tensor | None
    matrix: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """Map vectors, ``[N, D]``."""
        if self.mean is not None:
            x = x - self.mean.to(x.dtype)
        return x if self.matrix is None else x @ self.matrix.to(x.dtype)


@dataclass(frozen=True)
class PairSpace:
    """One map for each language of a pair."""

    source: LanguageMap
    target: LanguageMap


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
    centred = x - mean
    covariance = centred.T @ centred / len(x)
    isotropic = covariance.diagonal().mean() * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    values, basis = torch.linalg.eigh(torch.lerp(covariance, isotropic, _SHRINKAGE))
    return LanguageMap(mean, (basis * values.clamp(min=1e-30).rsqrt()) @ basis.T)
