"""The output layer and its cross-entropy, some rows at a time: all logits are never held."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tli_engine.ops.cross_entropy_rows import cross_entropy_rows_

# logits of a chunk: 256 MiB in fp32; where the weight has a gradient, whose sum in fp32 is read and
# written anew for each chunk, the chunks are fewer
_LOGITS, _LOGITS_TRAINED = 2**26, 2**28
# on a CPU, rows of the vocabulary whose gradient is computed at once: their logits' is copied to fp32
_VOCABULARY_ROWS = 16384


def chunk_rows(vocabulary: int, *, trained: bool = False) -> int:
    """Rows of hidden states whose logits are held at once; ``trained``: the weight has a gradient."""
    return max(64, (_LOGITS_TRAINED if trained else _LOGITS) // vocabulary // 64 * 64)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = None,
    rows: int | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    r"""Sum of the cross-entropies of logits :math:`h W^\top` against one target a row.

    Logits are products in ``hidden``'s dtype; their log-sum-exp is taken in fp32 (fp64 of fp64). The
    gradient of ``hidden`` is made on the way there, that of ``weight`` only if it is to have one,
    summed in fp32 over the chunks. Neither can be differentiated again.

    Args:
        hidden: ``[M, D]``; only rows that predict a target.
        weight: Output embeddings, ``[V, D]``, in ``hidden``'s dtype.
        targets: ``[M]``, int64.
        softcap: Logits are ``softcap * tanh(logits / softcap)`` first, as in Gemma 2.
        rows: Rows of logits held at once; by default 2²⁶ logits, 2²⁸ if the weight is to have a gradient.
        weights: Factor of each row's cross-entropy, ``[M]``, fp32; all 1 by default. A row of weight 0
            has no part in the loss and in no gradient.

    Returns:
        A scalar, fp32, or fp64 of fp64; 0 without rows.

    Raises:
        ValueError: The shapes or dtypes do not fit together.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        shapes = f"{list(hidden.shape)} and {list(weight.shape)}"
        raise ValueError(f"hidden and weight must be [M, D] and [V, D], got {shapes}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        got = f"{targets.dtype} {list(targets.shape)}"
        raise ValueError(f"targets must be int64 [{len(hidden)}], got {got}")
    if weight.dtype != hidden.dtype:
        raise ValueError(f"weight must be {hidden.dtype} as hidden, got {weight.dtype}")
    if weights is not None and (weights.shape != targets.shape or weights.dtype != torch.float32):
        got = f"{weights.dtype} {list(weights.shape)}"
        raise ValueError(f"weights must be float32 [{len(hidden)}], got {got}")
    if rows is not None and rows < 1:
        raise ValueError(f"rows must be positive, got {rows}")
    needed = torch.is_grad_enabled()
    needs = (needed and hidden.requires_grad, needed and weight.requires_grad)
    rows = chunk_rows(len(weight), trained=needs[1]) if rows is None else rows
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, weights, softcap, rows, needs
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        softcap: float | None,
        rows: int,
        needs: tuple[bool, bool],
    ) -> Tensor:
        acc = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=acc, device=hidden.device)
        dhidden = torch.empty_like(hidden) if needs[0] else None
        dweight = torch.zeros_like(weight, dtype=acc) if needs[1] else None
        for first in range(0, len(hidden), rows):
            part = slice(first, first + rows)
            read, factor = hidden[part], None if weights is None else weights[part]
            losses, dlogits = _chunk(read @ weight.T, targets[part], softcap, any(needs))
            loss += losses.sum() if factor is None else (losses * factor).sum()
            if dhidden is not None:
                torch.mm(dlogits, weight, out=dhidden[part])
            if factor is not None:
                # of the narrow side: the logits' gradient is left as it is
                read = read * factor[:, None].to(read.dtype)
                if dhidden is not None:
                    dhidden[part] *= factor[:, None].to(dhidden.dtype)
            if dweight is not None:
                _add_product(dweight, dlogits, read)
            # before the next chunk's logits take their place
            del dlogits
        ctx.save_for_backward(dhidden, dweight)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        if dhidden is not None:
            dhidden = dhidden * dloss.to(dhidden.dtype)
        if dweight is not None:
            # rounded as it is written: no second one in fp32
            rounded = torch.empty_like(dweight, dtype=ctx.dtype)
            dweight = torch.mul(dweight, dloss, out=rounded)
        return dhidden, dweight, None, None, None, None, None


def _chunk(
    logits: Tensor, targets: Tensor, softcap: float | None, needs_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The losses of a chunk's rows, and the gradient of its logits in their dtype."""
    if needs_gradient and not softcap:
        return cross_entropy_rows_(logits, targets), logits
    dtype = logits.dtype
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    slope = None
    if softcap:
        tanh = torch.tanh(logits / softcap)
        logits = tanh * softcap
        slope = 1 - tanh.square() if needs_gradient else None
    # one buffer from here on
    logits = logits.sub_(logits.amax(1, keepdim=True))
    at_target = logits.gather(1, targets[:, None])
    total = logits.exp_().sum(1, keepdim=True)
    losses = (total.log() - at_target)[:, 0]
    if not needs_gradient:
        return losses, logits
    dlogits = logits.div_(total)
    at_target = dlogits.gather(1, targets[:, None]) - 1
    dlogits.scatter_(1, targets[:, None], at_target)
    if slope is not None:
        dlogits *= slope
    return losses, dlogits.to(dtype)


def _add_product(dweight: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
    """Add ``dlogits.T @ hidden`` to ``dweight``, summed and added in its dtype."""
    if dweight.dtype == hidden.dtype:
        dweight.addmm_(dlogits.T, hidden)
        return
    if hidden.is_cuda:
        torch.addmm(dweight, dlogits.T, hidden, out_dtype=dweight.dtype, out=dweight)
        return
    wide = hidden.to(dweight.dtype)
    for first in range(0, len(dweight), _VOCABULARY_ROWS):
        part = slice(first, first + _VOCABULARY_ROWS)
        dweight[part].addmm_(dlogits[:, part].T.to(dweight.dtype), wide)
