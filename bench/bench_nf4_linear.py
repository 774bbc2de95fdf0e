"""NF4 linear layer, forward and dX: microseconds against cuBLAS in bf16, bitsandbytes, Unsloth.

The floor is the larger of bytes (0.5625 a weight, input and output once) over the copy bandwidth
and operations over the rate of an 8192^3 product, both measured in the same run. cuBLAS reads a
bf16 weight, 3.6 times the bytes.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.harness import (
    Row,
    copy_bandwidth,
    matmul_rate,
    print_gpu_rows,
    time_graphs,
    write_results,
)
from bench.nf4_shapes import SHAPES, Weights, check, make_weights, rotate, rows_of
from bench.peers import load_unsloth
from tli_engine.layouts import PortableWeight, RecordedWeight

M_VALUES = (1, 16, 64, 128, 256, 512, 1024, 4096)
PEERS = ["bitsandbytes", "unsloth"]


def product(
    x: Tensor, direction: str, fast: bool, stored: PortableWeight | RecordedWeight
) -> Tensor:
    """The op of the weight's layout, forward or dX, without autograd."""
    if direction == "fwd":
        return stored.product(x, None, fast)
    ops = torch.ops.tli_engine
    if isinstance(stored, PortableWeight):
        args = (stored.packed, stored.absmax, stored.K, 64, True, fast)
        return ops.nf4_linear_dx.default(x, *args)
    none = x.new_empty(x.shape[0], 0)
    args = (stored.records, stored.transposed, None, None, None, [], 1.0, 0.0, stored.K, fast)
    return ops.nf4_linear_records_backward.default(x, None, none, *args, True, False)[0]


def providers(weights: Weights, x: Tensor, direction: str) -> dict[str, list[Callable[[], object]]]:
    """Each provider's calls on a rotation of weights."""
    import bitsandbytes
    from bitsandbytes.functional import dequantize_4bit

    def bnb(packed: Tensor, state: object) -> Tensor:
        if direction == "fwd":
            return bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state)
        # what its autograd function does
        return x @ dequantize_4bit(packed, state)

    def cublas(weight: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, weight) if direction == "fwd" else x @ weight

    stored = [layer._stored for layer in weights.nf4]
    found = {
        "cublas-bf16": rotate(cublas, weights.dense),
        "bitsandbytes": rotate(bnb, *zip(*weights.bnb, strict=True)),
        "tli-engine": rotate(partial(product, x, direction, False), stored),
        "tli-engine:fast": rotate(partial(product, x, direction, True), stored),
    }
    if unsloth := load_unsloth():
        theirs = unsloth.forward if direction == "fwd" else unsloth.input_gradient
        found["unsloth"] = rotate(partial(theirs, x), *zip(*weights.bnb, strict=True))
    if isinstance(stored[0], RecordedWeight):
        # what a GPU without the extension's kernels runs
        found["tli-engine:triton"] = rotate(partial(product, x, direction, False), weights.tiled)
    return found


def bench_shape(
    name: str, N: int, K: int, m_values: list[int], bandwidth: float, rate: float
) -> list[Row]:
    """Time every M and direction of one weight."""
    weights = make_weights(N, K)
    rows = []
    for M in m_values:
        for direction in ("fwd", "dx"):
            x = torch.randn(M, K if direction == "fwd" else N, device="cuda", dtype=torch.bfloat16)
            calls = providers(weights, x, direction)
            dense = weights.dense[0].float()
            exact = x[:64].float() @ (dense.T if direction == "fwd" else dense)
            for provider, rotation in calls.items():
                check(rotation[0](), exact, f"{provider} {direction} {name} M={M}")
            del dense, exact
            count = max(4, len(weights.nf4)) if M <= 1024 else 4
            times = time_graphs(calls, count, rounds=7)
            nbytes = int(N * K * 0.5625) + 2 * M * (N + K)
            flops = 2 * M * N * K
            floor = max(nbytes / bandwidth, flops / rate)
            shape = {"M": M, "N": N, "K": K}
            rows += rows_of(
                direction, shape, name, times, "cublas-bf16", floor, bytes=nbytes, flops=flops
            )
            print_gpu_rows(rows[-len(calls) :])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument(
        "--m", nargs="+", type=int, default=list(M_VALUES), help="rows of the input"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    bandwidth, rate = copy_bandwidth(), matmul_rate()
    print(f"copy {bandwidth / 1e12:.2f} TB/s, bf16 8192^3 {rate / 1e12:.0f} TFLOP/s")
    rows: list[Row] = []
    with torch.no_grad():
        for name in args.shapes:
            rows += bench_shape(name, *SHAPES[name], args.m, bandwidth, rate)
            torch.cuda.empty_cache()
            # kept after every shape: a later one may run out of time
            path = write_results(
                "nf4_linear", rows, PEERS, copy_bytes_per_s=bandwidth, matmul_flops_per_s=rate
            )
    print(f"written: {path}")


if __name__ == "__main__":
    main()
