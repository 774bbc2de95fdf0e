"""Gradients of :mod:`tli_engine.reference.add_rms_norm`, in closed form."""

from torch import Tensor


def add_rms_norm_backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    rstd: Tensor,
    weight: Tensor,
    plus_one: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of ``h``, and that of ``weight``, empty unless it is needed.

    The first is the gradient of ``x`` and of the residual alike. All of it is computed in the dtype of
    ``rstd`` and rounded once.
    """
    dy, normed = dy.to(rstd.dtype), h.to(rstd.dtype) * rstd[:, None]
    scaled = dy * (weight.to(rstd.dtype) + float(plus_one))
    dx = rstd[:, None] * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    if dh is not None:
        dx = dx + dh
    dweight = (dy * normed).sum(0).to(weight.dtype) if needs_dweight else weight.new_empty(0)
    return dx.to(h.dtype).contiguous(), dweight
