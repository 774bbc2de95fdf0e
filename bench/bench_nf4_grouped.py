"""Projections that share an input, in one launch or in one each: q, k, v and gate, up of Llama-3-8B.

Forward, bf16, exact; weights rotated out of the L2 cache.
"""

import argparse
import statistics
from functools import partial

import torch
from torch import Tensor

from bench.harness import Row, print_gpu_rows, quantiles_ms, time_graphs, write_results
from bench.nf4_shapes import copies, random_nf4
from tli_engine.nf4 import concatenate
from tli_engine.nn import NF4Linear

GROUPS = {  # rows of each, K
    "8b-qkv": ([4096, 1024, 1024], 4096),
    "8b-gate-up": ([14336, 14336], 4096),
}
M_VALUES = (1, 16, 64, 256, 1024)


def one_each(x: Tensor, layers: list[NF4Linear]) -> list[Tensor]:
    return [layer(x) for layer in layers]


def bench_group(name: str, m_values: list[int]) -> list[Row]:
    sizes, K = GROUPS[name]
    count = copies(sum(sizes), K, 0.5625)
    weights = [[random_nf4(n, K, 31 * i + j) for j, n in enumerate(sizes)] for i in range(count)]
    apart = [[NF4Linear(w) for w in group] for group in weights]
    together = [NF4Linear(concatenate(group)) for group in weights]
    rows = []
    for M in m_values:
        x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
        same = torch.cat(one_each(x, apart[0]), 1)
        error = (together[0](x) - same).norm() / same.norm()
        if not error < 6e-3:
            raise SystemExit(f"{name} M={M}: relative error {error:.1e}; not timed")
        calls = {
            "one-each": [partial(one_each, x, group) for group in apart],
            "grouped": [partial(layer, x) for layer in together],
        }
        times = time_graphs(calls, max(4, count), rounds=9)
        base = statistics.median(times["one-each"])
        shape = {"M": M, "N": sum(sizes), "K": K}
        rows += [
            Row("fwd", shape, name, p, *quantiles_ms(s), base / statistics.median(s))
            for p, s in times.items()
        ]
        print_gpu_rows(rows[-2:])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument(
        "--m", nargs="+", type=int, default=list(M_VALUES), help="rows of the input"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    rows: list[Row] = []
    with torch.no_grad():
        for name in args.shapes:
            rows += bench_group(name, args.m)
    print(f"written: {write_results('nf4_grouped', rows, [])}")


if __name__ == "__main__":
    main()
