"""Find the fastest tiles of the CUDA C++ products on this Hopper GPU; write ``kernels/nf4_sm90_tuned.py``.

python -m bench.tune_sm90 [--shapes NAME ...]
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench.harness import time_graphs
from bench.nf4_shapes import SHAPES, copies, random_nf4
from tli_engine import extension
from tli_engine.kernels import nf4_sm90_dispatch
from tli_engine.kernels.nf4_records import dequantize_records
from tli_engine.kernels.nf4_sm90_dispatch import GEMV_M, Gemv, Tile, bucket, gemv_cuts, launch
from tli_engine.kernels.nf4_sm90_tuned import TUNED
from tli_engine.reference.nf4_records import to_records

TARGET = Path(nf4_sm90_dispatch.__file__).resolve().parent / "nf4_sm90_tuned.py"
BUCKETS = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 4096)
# block_m, blocks a warpgroup, warpgroups, CTAs a multiprocessor: those that csrc/ compiles
KERNELS = (
    *((16, 1, 4, 1), (16, 1, 2, 1), (16, 1, 2, 2), (32, 1, 4, 1), (64, 1, 2, 1), (64, 1, 4, 1)),
    *((128, 1, 2, 1), (128, 2, 2, 1), (256, 1, 2, 1)),
)
# those that it compiles for clusters of two too
CLUSTERED = ((128, 1, 2, 1), (256, 1, 2, 1))


def candidates(rows: int, contraction: int, M: int) -> list[Tile | Gemv]:
    """Tiles that could win: not much taller than M, and shared among CTAs where they are few."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    found: list[Tile | Gemv] = []
    if M <= GEMV_M:
        cuts = gemv_cuts(rows, contraction, sms)
        busy = max(cut.split * cut.groups for cut in cuts) if cuts else 0
        found += [cut for cut in cuts if cut.split * cut.groups >= busy * 2 // 3]
    for kernel in KERNELS:
        block_m, blocks, warpgroups, ctas = kernel
        if block_m > max(16, bucket(M)) or 4 * block_m < min(M, 1024):
            continue
        most = sms * ctas
        for cluster in (1, 2) if kernel in CLUSTERED else (1,):
            ctas_of_tiles = (
                cluster * -(-M // block_m) * -(-rows // (64 * blocks * warpgroups * cluster))
            )
            grids = [0, most // cluster * cluster, *([128] if ctas == 1 else [])]
            found += [Tile(*kernel, 0, 1, grid, cluster) for grid in grids]
            found += [
                Tile(*kernel, 1, split, 0, cluster)
                for split in range(2, min(16, contraction // 128) + 1)
                if most * 2 // 3 <= ctas_of_tiles * split <= most
            ]
    return found


def dequantize_first(x: Tensor, records: Tensor, N: int, K: int, direction: str) -> Tensor:
    """What dispatch does where no tile is chosen."""
    weight = dequantize_records(records, N, K, x.dtype)
    return x @ weight.T if direction == "fwd" else x @ weight


def tune_shape(
    N: int, K: int, buckets: list[int]
) -> dict[tuple[str, int, int, int, bool], Tile | Gemv | None]:
    """The best tile by direction, sizes, bucket and numerics."""
    sources = [random_nf4(N, K, seed) for seed in range(copies(N, K, 0.5625))]
    best: dict[tuple[str, int, int, int, bool], Tile | Gemv | None] = {}
    forward = [to_records(w.packed, w.absmax, N, K, False) for w in sources]
    for direction, rows, contraction in (("fwd", N, K), ("dx", K, N)):
        records = [to_records(w.packed, w.absmax, N, K, direction == "dx") for w in sources]
        torch.cuda.synchronize()
        for M in buckets:
            x = torch.randn(M, contraction, device="cuda", dtype=torch.bfloat16)
            for fast in (False, True):
                run = partial(launch, x, rows=rows, transposed=direction == "dx", fast=fast)
                ranking: list[tuple[float, Tile | Gemv | None]] = [
                    (_seconds([partial(run, records=r, tile=tile) for r in records]), tile)
                    for tile in candidates(rows, contraction, M)
                ]
                if M >= 1024:
                    calls = [partial(dequantize_first, x, r, N, K, direction) for r in forward]
                    ranking.append((_seconds(calls), None))
                seconds, tile = min(ranking, key=lambda entry: entry[0])
                best[direction, rows, contraction, M, fast] = tile
                name = "fast" if fast else "exact"
                print(
                    f"{direction} {rows}x{contraction} M={M} {name}: {seconds * 1e6:.1f} us "
                    f"{tile and tuple(tile)}, {len(ranking)} tried",
                    flush=True,
                )
    return best


def _seconds(calls: list[Callable[[], Tensor]]) -> float:
    times = time_graphs({"": calls}, min(len(calls), 12), rounds=3)[""]
    return statistics.median(times)


def write(table: dict, target: Path) -> None:
    """Write the table as the module that dispatch reads."""
    head = TARGET.read_text().partition("TUNED")[0]
    kind = "dict[tuple[str, int, int, int, bool], tuple[int, ...] | None]"
    lines = [f"    {key}: {value and tuple(value)}," for key, value in sorted(table.items())]
    body = "\n".join(lines).replace("'", '"')
    target.write_text(f"{head}TUNED: {kind} = {{\n{body}\n}}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--m", nargs="+", type=int, choices=BUCKETS, default=list(BUCKETS))
    parser.add_argument("--seconds", type=float, default=1e9, help="start no shape after these")
    args = parser.parse_args()
    if not extension.load():
        parser.error(f"the CUDA extension is {extension.status()}")
    begin, table = time.monotonic(), dict(TUNED)
    for name in args.shapes:
        if time.monotonic() - begin > args.seconds:
            break
        table.update(tune_shape(*SHAPES[name], args.m))
        torch.cuda.empty_cache()
        write(table, Path(os.environ["OUT"]) / TARGET.name if "OUT" in os.environ else TARGET)


if __name__ == "__main__":
    main()
