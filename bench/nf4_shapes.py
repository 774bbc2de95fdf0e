"""Linear layers to time, their weights on the GPU, and what every NF4 bench derives from times."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import Row, quantiles_ms
from tli_engine.layouts import PortableWeight
from tli_engine.nf4 import NF4Weight, quantize
from tli_engine.nn import NF4Linear

SHAPES = {  # N, K
    "8b-qkv": (6144, 4096),
    "8b-o": (4096, 4096),
    "8b-gate-up": (28672, 4096),
    "8b-down": (4096, 14336),
    "72b-o": (8192, 8192),
    "72b-gate-up": (59136, 8192),
    "72b-down": (8192, 29568),
}
# weights between two uses of one copy: several times an L2 cache of 60 MB
_ROTATION_BYTES = 250_000_000


def copies(N: int, K: int, bytes_per_weight: float) -> int:
    """How many copies of a weight a rotation takes."""
    return max(2, min(24, int(_ROTATION_BYTES / (N * K * bytes_per_weight)) + 1))


def random_nf4(N: int, K: int, seed: int) -> NF4Weight:
    """A weight of normal values, quantised from bf16."""
    generator = torch.Generator("cuda").manual_seed(seed)
    dense = torch.empty(N, K, device="cuda", dtype=torch.bfloat16)
    return quantize(dense.normal_(0, 0.02, generator=generator))


@dataclass(frozen=True)
class Weights:
    """One shape's weights in every provider's format; each list is a rotation."""

    nf4: list[NF4Linear]
    tiled: list[PortableWeight]
    dense: list[Tensor]
    bnb: list[tuple[Tensor, Any]]


def make_weights(N: int, K: int) -> Weights:
    """Random weights; bitsandbytes gets the very bytes."""
    sources = [random_nf4(N, K, seed) for seed in range(copies(N, K, 0.5625))]
    dense = [w.dequantize(torch.bfloat16) for w in sources[: copies(N, K, 2)]]
    layers = [NF4Linear(w) for w in sources]
    for layer in layers:
        layer.add_transposed_copy()
    tiled = [PortableWeight(w) for w in sources]
    return Weights(layers, tiled, dense, [bnb_weight(w) for w in sources])


def bnb_weight(weight: NF4Weight) -> tuple[Tensor, Any]:
    """The bytes as bitsandbytes holds them."""
    from bitsandbytes.functional import QuantState

    from tli_engine.nf4 import CODE

    nested = weight.nested
    state = QuantState(
        absmax=weight.absmax,
        shape=torch.Size(weight.shape),
        code=CODE.to(weight.device),
        blocksize=weight.block_size,
        quant_type="nf4",
        dtype=weight.dtype,
        offset=None if nested is None else nested.offset,
        state2=None
        if nested is None
        else QuantState(
            absmax=nested.absmax,
            code=nested.code,
            blocksize=nested.block_size,
            dtype=torch.float32,
        ),
    )
    return weight.packed, state


def bnb_linear(packed: Tensor, state: Any, bias: Tensor | None = None) -> nn.Module:
    """Make a layer of bitsandbytes of :func:`bnb_weight`'s; it computes in the state's dtype."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    N, K = state.shape
    linear: nn.Module = Linear4bit(
        K, N, bias=False, compute_dtype=state.dtype, compress_statistics=False, quant_type="nf4",
        device="meta",
    )  # fmt: skip
    linear.weight = Params4bit(
        packed, requires_grad=False, quant_state=state, bnb_quantized=True, quant_type="nf4",
        compress_statistics=False, blocksize=state.blocksize, module=linear,
    )  # fmt: skip
    linear.quant_state = state
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def rows_of(
    case: str,
    shape: dict[str, int],
    model: str,
    times: Mapping[str, Sequence[float]],
    baseline: str,
    floor_s: float,
    **counts: int,
) -> list[Row]:
    """Rows of one case; the ratio is of medians."""
    base = statistics.median(times[baseline])
    return [
        Row(
            case,
            shape,
            model,
            provider,
            *quantiles_ms(seconds),
            ratio_to_baseline=base / statistics.median(seconds),
            roofline=floor_s / statistics.median(seconds),
            **counts,
        )
        for provider, seconds in times.items()
    ]


def check(actual: Any, exact: Tensor, what: str) -> None:
    """Stop unless the first rows are ``exact``, in fp32 of the same weight, up to rounding."""
    error = (actual[: len(exact)].float() - exact).norm() / exact.norm()
    if not error < 6e-3:
        raise SystemExit(f"{what}: relative error {error:.1e}; not timed")


def rotate(call: Callable[..., object], *items: Sequence[Any]) -> list[Callable[[], object]]:
    """``call`` on each group of items, as calls without arguments."""
    return [lambda group=group: call(*group) for group in zip(*items, strict=False)]
