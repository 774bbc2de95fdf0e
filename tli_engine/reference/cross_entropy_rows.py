"""Cross-entropy of rows of logits, which their gradient overwrites, in plain PyTorch."""

import torch
from torch import Tensor


def cross_entropy_rows(logits: Tensor, targets: Tensor) -> Tensor:
    """Overwrite; return the losses; see :func:`tli_engine.ops.cross_entropy_rows.cross_entropy_rows_`.

    All is computed in fp32, or fp64, and the gradient rounded once.
    """
    acc = torch.promote_types(logits.dtype, torch.float32)
    V = logits.shape[1]
    known = (targets >= 0) & (targets < V)
    column = targets.long().clamp(0, V - 1)[:, None]
    log_p = logits.log_softmax(1, dtype=acc).masked_fill_(~known[:, None], torch.nan)
    losses = -log_p.gather(1, column)[:, 0]
    p = log_p.exp_()
    logits.copy_(p.scatter_(1, column, p.gather(1, column) - 1))
    return losses
