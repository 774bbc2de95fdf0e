"""Differentiable, ``torch.compile``-able operators."""

from tli_engine.ops.cosine_similarity import cosine_similarity
from tli_engine.ops.segment_mean import segment_mean

__all__ = ["cosine_similarity", "segment_mean"]
