"""Contrastive losses on a batch's cosine similarities, ``[N, N]``, true pairs on the diagonal."""

import torch
from torch import Tensor

from tli_engine.config import AlignConfig


def alignment_loss(cosine: Tensor, is_negative: Tensor, config: AlignConfig) -> Tensor:
    """Mean loss over a batch, in one direction or averaged over both.

    Args:
        cosine: Similarity of source i and target j, ``[N, N]``.
        is_negative: Whether target j is a wrong translation of source i, ``[N, N]``, bool.
        config: Loss, margin, temperature, ``two_way``.

    Returns:
        Scalar; zero where no row has a negative.
    """
    loss = _one_way(cosine, is_negative, config)
    if config.two_way:
        loss = 0.5 * (loss + _one_way(cosine.T, is_negative.T, config))
    return loss


def _one_way(cosine: Tensor, is_negative: Tensor, config: AlignConfig) -> Tensor:
    positive = cosine.diagonal()
    if config.loss == "infonce":
        # van den Oord et al. 2018, eq. 4
        usable = is_negative | torch.eye(len(cosine), dtype=torch.bool, device=cosine.device)
        logits = (cosine / config.temperature).masked_fill(~usable, -torch.inf)
        return (logits.logsumexp(1) - positive / config.temperature).mean()
    candidates = is_negative
    if config.loss == "triplet-semihard":
        # Schroff et al. 2015: farther than the positive, within the margin
        gap = positive[:, None] - cosine
        candidates = is_negative & (gap > 0) & (gap < config.margin)
    hardest = cosine.masked_fill(~candidates, -torch.inf).amax(1)
    return torch.relu(config.margin + hardest - positive).mean()
