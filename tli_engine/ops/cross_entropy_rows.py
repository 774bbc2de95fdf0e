"""``tli_engine::cross_entropy_rows_``: schema, shape rules and backends; it has no gradient."""

import torch
from torch import Tensor

from tli_engine import backends
from tli_engine.ops.nf4_linear import check_dtype
from tli_engine.reference.cross_entropy_rows import cross_entropy_rows as _reference

_OP = "tli_engine::cross_entropy_rows_"

torch.library.define(_OP, "(Tensor(a!) logits, Tensor targets) -> Tensor")


@torch.library.register_fake(_OP)
def _fake(logits: Tensor, targets: Tensor) -> Tensor:
    acc = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(logits.shape[0], dtype=acc)


torch.library.impl(_OP, "CPU")(_reference)


@torch.library.impl(_OP, "CUDA")
def _cuda(logits: Tensor, targets: Tensor) -> Tensor:
    return backends.resolve("cross_entropy_rows")(logits, targets)  # type: ignore[no-any-return]


def cross_entropy_rows_(logits: Tensor, targets: Tensor) -> Tensor:
    r"""Cross-entropy of each row; its gradient, not yet averaged, takes the logits' place.

    .. math:: \ell_i = \log \sum_j e^{z_{ij}} - z_{i t_i}, \qquad
              z_{ij} \leftarrow \frac{e^{z_{ij}}}{\sum_k e^{z_{ik}}} - [j = t_i]

    which is the gradient of :math:`\sum_i \ell_i`. Sums are in fp32 (fp64 for fp64), and the gradient
    is rounded once. Nothing but the losses is allocated on a GPU, and no device is waited for: whether
    targets are in range is not checked. One that is not, such as -100, is no row to leave out: its loss
    and all of its row's gradient are NaN. So is a row with a logit that is NaN or plus infinity, or in
    which all are minus infinity; a few logits of minus infinity have a gradient of zero.

    Args:
        logits: ``[L, V]``, bf16, fp16 or fp32, on the CPU fp64 too; the last dimension is contiguous,
            rows may lie apart. Overwritten.
        targets: Column of each row, ``[L]``, int32 or int64.

    Returns:
        Losses, ``[L]``, fp32, or fp64 for fp64.

    Raises:
        ValueError: A shape, dtype, stride or device is not as above, or ``logits`` would need a
            gradient, whose graph knows nothing of this op.
    """
    check_dtype(logits, "logits")
    if logits.ndim != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits must be [L, V], got {list(logits.shape)}")
    L, V = logits.shape
    if (V > 1 and logits.stride(1) != 1) or (L > 1 and logits.stride(0) < V):
        got = f"strides {list(logits.stride())}"
        raise ValueError(f"logits must have contiguous rows that do not overlap, got {got}")
    if targets.shape != (L,) or targets.dtype not in (torch.int32, torch.int64):
        got = f"{targets.dtype} {list(targets.shape)}"
        raise ValueError(f"targets must be int32 or int64 [{L}], got {got}")
    if targets.device != logits.device:
        raise ValueError(f"targets must be on {logits.device} as logits, got {targets.device}")
    if logits.requires_grad and torch.is_grad_enabled():
        raise ValueError("logits must not require a gradient: theirs overwrites them")
    losses: Tensor = torch.ops.tli_engine.cross_entropy_rows_.default(logits, targets)
    return losses
