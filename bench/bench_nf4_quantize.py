"""NF4 quantisation of a bf16 weight: microseconds against bitsandbytes' kernel.

Launched one by one: bitsandbytes 0.50 quantises on the default stream, which no graph captures, so
that the smallest weights measure the host. ``tli-engine:graph`` is a graph's replay.
"""

import argparse
from typing import Any

import torch

from bench.harness import (
    Row,
    copy_bandwidth,
    print_gpu_rows,
    time_graphs,
    time_launches,
    write_results,
)
from bench.nf4_shapes import SHAPES, copies, rotate, rows_of
from tli_engine.nf4 import quantize

PEERS = ["bitsandbytes"]


def bench_shape(name: str, N: int, K: int, bandwidth: float) -> list[Row]:
    # registers torch.ops.bitsandbytes; its Python wrapper cannot be captured
    import bitsandbytes  # noqa: F401

    dense = [torch.randn(N, K, device="cuda", dtype=torch.bfloat16) for _ in range(copies(N, K, 2))]
    ours: Any = torch.ops.tli_engine.nf4_quantize.default
    theirs: Any = torch.ops.bitsandbytes.quantize_4bit.default
    expected = quantize(dense[0])
    packed, absmax = ours(dense[0], 64)
    if not torch.equal(packed, expected.packed) or not torch.equal(absmax, expected.absmax):
        raise SystemExit(f"{name}: not the bits of tli_engine.nf4.quantize; not timed")
    calls = {
        "bitsandbytes": rotate(lambda w: theirs(w, 64, "nf4", torch.uint8), dense),
        "tli-engine": rotate(lambda w: ours(w, 64), dense),
    }
    times = time_launches(calls, max(8, len(dense)))
    graph = {"tli-engine:graph": calls["tli-engine"]}
    times |= time_graphs(graph, max(8, len(dense)))
    # bf16 read once, codes and absmax written once
    nbytes = int(N * K * 2.5625)
    shape = {"N": N, "K": K}
    rows = rows_of("quantize", shape, name, times, "bitsandbytes", nbytes / bandwidth, bytes=nbytes)
    print_gpu_rows(rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    args = parser.parse_args()
    import tli_engine.ops  # noqa: F401

    bandwidth = copy_bandwidth()
    print(f"copy {bandwidth / 1e12:.2f} TB/s")
    rows: list[Row] = []
    for name in args.shapes:
        rows += bench_shape(name, *SHAPES[name], bandwidth)
        torch.cuda.empty_cache()
    print(f"written: {write_results('nf4_quantize', rows, PEERS, copy_bytes_per_s=bandwidth)}")


if __name__ == "__main__":
    main()
