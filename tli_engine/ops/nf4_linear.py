"""``tli_engine::nf4_linear`` and its gradient: schemas, shape rules, backends."""

from typing import Any, Literal

import torch
from torch import Tensor

from tli_engine import backends
from tli_engine.nf4 import DTYPES, NF4Weight
from tli_engine.ops.autocast import cast_input, without_autocast
from tli_engine.ops.nf4_dequantize import check_stored
from tli_engine.reference.nf4_linear import nf4_linear as _reference
from tli_engine.reference.nf4_linear import tile as tile
from tli_engine.reference.nf4_linear import untile as untile
from tli_engine.reference.nf4_linear_dx import nf4_linear_dx as _reference_dx

Numerics = Literal["exact", "fast"]

_OP = "tli_engine::nf4_linear"
_DX = "tli_engine::nf4_linear_dx"

torch.library.define(
    _OP,
    "(Tensor x, Tensor packed, Tensor absmax, Tensor? bias, SymInt N, int block_size, "
    "bool tiled, bool fast) -> Tensor",
)
torch.library.define(
    _DX,
    "(Tensor dy, Tensor packed, Tensor absmax, SymInt K, int block_size, bool tiled, "
    "bool fast) -> Tensor",
)


@torch.library.register_fake(_OP)
def _fake(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    N: int,
    block_size: int,
    tiled: bool,
    fast: bool,
) -> Tensor:
    return x.new_empty(x.shape[0], N)


@torch.library.register_fake(_DX)
def _fake_dx(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    K: int,
    block_size: int,
    tiled: bool,
    fast: bool,
) -> Tensor:
    return dy.new_empty(dy.shape[0], K)


torch.library.impl(_OP, "CPU")(without_autocast("cpu", _reference))
torch.library.impl(_DX, "CPU")(without_autocast("cpu", _reference_dx))


@torch.library.impl(_OP, "CUDA")
def _cuda(*args: Any) -> Tensor:
    return without_autocast("cuda", backends.resolve("nf4_linear"))(*args)  # type: ignore[no-any-return]


@torch.library.impl(_DX, "CUDA")
def _cuda_dx(*args: Any) -> Tensor:
    return without_autocast("cuda", backends.resolve("nf4_linear_dx"))(*args)  # type: ignore[no-any-return]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, absmax, _, _, *ctx.layout = inputs
    ctx.save_for_backward(packed, absmax)
    ctx.K = x.shape[1]


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    packed, absmax = ctx.saved_tensors
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.tli_engine.nf4_linear_dx.default(dy, packed, absmax, ctx.K, *ctx.layout)
    if ctx.needs_input_grad[3]:
        dbias = dy.sum(0)
    return dx, None, None, dbias, None, None, None, None


def _setup_context_dx(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, packed, absmax, _, *ctx.layout = inputs
    ctx.save_for_backward(packed, absmax)
    ctx.N = dy.shape[1]


def _backward_dx(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    packed, absmax = ctx.saved_tensors
    ddy = None
    if ctx.needs_input_grad[0]:
        ddy = torch.ops.tli_engine.nf4_linear.default(ddx, packed, absmax, None, ctx.N, *ctx.layout)
    return ddy, None, None, None, None, None, None


torch.library.register_autograd(_OP, _backward, setup_context=_setup_context)
torch.library.register_autograd(_DX, _backward_dx, setup_context=_setup_context_dx)


def check_dtype(x: Tensor, name: str = "x") -> None:
    """Raise ``ValueError`` unless the backends of ``x``'s device take its dtype."""
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {x.dtype}")
    if x.is_cuda and x.dtype not in DTYPES:
        known = "bf16, fp16 or fp32 on a GPU"
        raise ValueError(f"{name} must be {known}, got {x.dtype}; fp64 is for a CPU")
    if x.dtype not in (*DTYPES, torch.float64):
        raise ValueError(f"{name} must be bf16, fp16, fp32 or fp64, got {x.dtype}")


def check_input(x: Tensor, N: int, K: int, device: torch.device) -> None:
    """Raise ``ValueError`` unless ``x`` suits a weight ``[N, K]`` on ``device``."""
    check_dtype(x)
    if x.ndim == 0 or x.shape[-1] != K:
        raise ValueError(f"x must be [..., {K}] for a weight [{N}, {K}], got {list(x.shape)}")
    if x.device != device:
        raise ValueError(f"x must be on {device} as the weight, got {x.device}")


def check_sides(x: Tensor, N: int, K: int, device: torch.device, bias: Tensor | None) -> None:
    """Raise ``ValueError`` unless input and bias suit a weight ``[N, K]`` on ``device``."""
    check_input(x, N, K, device)
    if bias is not None and (bias.shape != (N,) or bias.dtype != x.dtype):
        raise ValueError(f"bias must be {x.dtype} [{N}], got {bias.dtype} {list(bias.shape)}")
    if bias is not None and bias.device != x.device:
        raise ValueError(f"bias must be on {x.device} as x, got {bias.device}")


def check_linear(x: Tensor, weight: NF4Weight, bias: Tensor | None, numerics: str) -> None:
    """Raise ``ValueError`` unless the arguments fit together; see :func:`nf4_linear`."""
    if len(weight.shape) != 2:
        raise ValueError(f"weight must be [N, K], got {list(weight.shape)}")
    check_stored(weight)
    N, K = weight.shape
    check_sides(x, N, K, weight.device, bias)
    if numerics not in ("exact", "fast"):
        raise ValueError(f"numerics must be exact or fast, got {numerics!r}")


def nf4_linear(
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None = None,
    *,
    numerics: Numerics = "exact",
) -> Tensor:
    r"""Product with a frozen NF4 weight, and, backward, with its transpose.

    .. math:: y = x\,W^\top + b, \qquad \mathrm{d}x = \mathrm{d}y\,W

    summed in fp32. :math:`W` holds bitsandbytes' values in ``x``'s dtype, bit for bit
    (``exact``); ``fast`` may instead round the codes and the absmax to that dtype and multiply.
    A layer that is used again does better with :class:`tli_engine.nn.NF4Linear`, which decodes
    a double quantised absmax once and lays the bytes out for the kernels.

    Args:
        x: Input, ``[..., K]``, cast under autocast, any strides, no rows allowed; bf16, fp16, fp32 or, on a
            CPU, fp64.
        weight: Frozen weight, ``[N, K]``; K need be no multiple of the block size.
        bias: ``[N]`` of ``x``'s dtype, or None.
        numerics: ``exact`` or ``fast``; they differ only where a fused kernel runs.

    Returns:
        The product, ``[..., N]``, contiguous, in ``x``'s dtype; NaN or infinity in the rows of the
        weight where an absmax is, and in those alone.

    Raises:
        ValueError: A shape, dtype or device is not as above.

    Source: Dettmers et al. 2023 (QLoRA), eq. 5.
    """
    x = cast_input(x)
    bias = None if bias is None else cast_input(bias)
    check_linear(x, weight, bias, numerics)
    y: Tensor = torch.ops.tli_engine.nf4_linear.default(
        x.reshape(-1, weight.shape[1]),
        weight.packed,
        weight.absmax_fp32(),
        bias,
        weight.shape[0],
        weight.block_size,
        False,
        numerics == "fast",
    )
    return y.view(*x.shape[:-1], weight.shape[0])
