"""Dense bf16 layer with LoRA, forward, and forward and backward (dX, dA, dB): what the update costs on top.

``frozen`` is the layer without an adapter, forward and dX. PEFT is its layer with the adapter in bf16,
``torch`` the same numbers in the fewest calls: a product, x A^T, and B's product added to what is rounded.
The engine's adapter is in fp32, as it is trained, and is added to the product's sums. On a GPU times are
those of replayed graphs; on a CPU, where shapes are small, of calls in turns.

python -m bench dense_lora_linear [--shapes NAME ...] [--m M ...]
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from bench import nf4_shapes
from bench.bench_nf4_lora_linear import RANK, SCALING, Layer, check_step, peft_layer, step
from bench.harness import (
    Row,
    interleave,
    print_gpu_rows,
    quantiles_ms,
    time_graphs,
    write_results,
)
from tli_engine.ops import dense_lora_linear

PEERS = ["peft"]
BASELINE, FROZEN = "peft", "frozen"
# of the 8B shape; on a CPU of a model an eighth as wide
SHAPES = {name: nk for name, nk in nf4_shapes.SHAPES.items() if name.startswith("8b-")}
SMALL = {name.replace("8b", "small"): (N // 8, K // 8) for name, (N, K) in SHAPES.items()}
M_VALUES, SMALL_M = (16, 64, 256, 1024, 4096, 8192), (16, 256)


def make_weights(N: int, K: int, device: torch.device) -> list[Tensor]:
    """Random weights ``[N, K]``, a rotation that exceeds a GPU's L2 cache."""
    count = nf4_shapes.copies(N, K, 2) if device.type == "cuda" else 1
    return [(torch.randn(N, K, device=device) * 0.02).bfloat16() for _ in range(count)]


def dense_linear(weight: Tensor) -> nn.Linear:
    """The weight as a frozen layer."""
    linear = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def providers(weights: Sequence[Tensor], M: int) -> dict[str, list[Layer]]:
    """Each provider's layers, a rotation of weights."""
    (N, K), device = weights[0].shape, weights[0].device
    x = torch.randn(M, K, device=device, dtype=torch.bfloat16, requires_grad=True)
    lora_A = (torch.randn(RANK, K, device=device) * 0.02).requires_grad_()
    lora_B = (torch.randn(N, RANK, device=device) * 0.02).requires_grad_()
    a, b = (t.detach().bfloat16().requires_grad_() for t in (lora_A, lora_B))

    def peft(weight: Tensor) -> Layer:
        layer = peft_layer(dense_linear(weight), torch.bfloat16)
        return layer, [x, *(p for p in layer.parameters() if p.requires_grad)]

    def plain(t: Tensor, weight: Tensor) -> Tensor:
        return torch.addmm(nn.functional.linear(t, weight), t @ a.T, b.T, alpha=SCALING)

    def ours(t: Tensor, weight: Tensor) -> Tensor:
        return dense_lora_linear(t, weight, lora_A, lora_B, SCALING)

    return {
        BASELINE: [peft(w) for w in weights],
        "torch": [(partial(plain, weight=w), [x, a, b]) for w in weights],
        FROZEN: [(partial(nn.functional.linear, weight=w), [x]) for w in weights],
        "tli-engine": [(partial(ours, weight=w), [x, lora_A, lora_B]) for w in weights],
    }


def forward(call: Callable[[Tensor], Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """One forward that keeps nothing."""
    with torch.no_grad():
        return call(inputs[0])


def time_calls(
    calls: Mapping[str, Sequence[Callable[[], object]]], count: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each call, a value a round: of ``count`` in a graph on a GPU, of one on a CPU."""
    if torch.cuda.is_available():
        return time_graphs(calls, count, rounds)
    return interleave(
        {name: rotation[0] for name, rotation in calls.items()}, dict.fromkeys(calls, rounds)
    )


def rows_of(
    case: str, model: str, shape: dict[str, int], times: Mapping[str, Sequence[float]]
) -> list[Row]:
    """Rows of one case; those of adapted layers say what they take over the frozen one."""
    base, frozen = (statistics.median(times[name]) for name in (BASELINE, FROZEN))
    rows = []
    for provider, seconds in times.items():
        median = statistics.median(seconds)
        notes = {} if provider == FROZEN else {"over_frozen": median / frozen - 1}
        ratio = base / median
        rows.append(Row(case, shape, model, provider, *quantiles_ms(seconds), ratio, notes=notes))
    print_gpu_rows(rows)
    added = ", ".join(
        f"{row.provider} {100 * row.notes['over_frozen']:.1f} %" for row in rows if row.notes
    )
    print(f"  the update adds to the frozen layer: {added}")
    return rows


def bench_shape(name: str, N: int, K: int, m_values: Sequence[int], rounds: int = 7) -> list[Row]:
    """Forward, and forward and backward, of so many rows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights, rows = make_weights(N, K, device), []
    for M in m_values:
        dy = torch.randn(M, N, device=device, dtype=torch.bfloat16)
        # on leaves of its own: a graph captures only leaves that no other stream has met
        for provider, rotation in providers(weights, M).items():
            check_step(rotation[0], dy, weights[0], f"{provider} {name} M={M}")
        found, shape = providers(weights, M), {"M": M, "N": N, "K": K, "r": RANK}
        for case, count in (("fwd", 12), ("fwd_bwd", 6)):
            calls = {
                provider: [
                    partial(forward, *layer) if case == "fwd" else partial(step, *layer, dy)
                    for layer in rotation
                ]
                for provider, rotation in found.items()
            }
            rows += rows_of(case, name, shape, time_calls(calls, count, rounds))
        del calls, found, rotation
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def main() -> None:
    shapes, m_values = (SHAPES, M_VALUES) if torch.cuda.is_available() else (SMALL, SMALL_M)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=shapes, default=list(shapes))
    parser.add_argument(
        "--m", nargs="+", type=int, default=list(m_values), help="rows of the input"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    rows: list[Row] = []
    for name in args.shapes:
        rows += bench_shape(name, *shapes[name], args.m)
        path = write_results("dense_lora_linear", rows, PEERS)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
