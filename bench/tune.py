"""Find the fastest tiles of the fused NF4 products on this GPU and write ``kernels/nf4_tuned.py``.

python -m bench.tune [--shapes NAME ...]
"""

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bench.harness import time_graphs
from bench.nf4_shapes import SHAPES, copies, random_nf4
from tli_engine.kernels import nf4_dispatch
from tli_engine.kernels.nf4_dequantize import dequantize_tiles
from tli_engine.kernels.nf4_dispatch import Tile
from tli_engine.kernels.nf4_linear import fused_forward
from tli_engine.kernels.nf4_linear_dx import fused_dx
from tli_engine.kernels.nf4_tuned import TUNED
from tli_engine.layouts import PortableWeight

TARGET = Path(nf4_dispatch.__file__).resolve().parent / "nf4_tuned.py"
BUCKETS = (16, 32, 64, 128, 256)
# block_m, block_n, warps, stages
_FORWARD = (
    *((16, 128, 4, 3), (16, 128, 4, 5), (16, 64, 4, 4), (16, 256, 8, 4)),
    *(
        (32, 128, 4, 4),
        (32, 256, 8, 3),
        (64, 64, 4, 4),
        (64, 128, 4, 3),
        (64, 128, 8, 3),
        (64, 256, 8, 3),
    ),
    *((128, 64, 4, 3), (128, 128, 8, 3), (128, 256, 8, 3)),
)
_DX = (
    *((16, 64, 4, 3), (16, 128, 4, 3), (32, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 4)),
    *((64, 128, 8, 3), (128, 64, 4, 3), (128, 64, 4, 4), (128, 128, 8, 3)),
)


def tiles(direction: str) -> list[Tile]:
    """Every tile to try."""
    shapes, splits = (_FORWARD, (1, 2, 4, 8)) if direction == "fwd" else (_DX, (1, 2, 4, 8, 16))
    return [Tile(m, n, split, w, s) for m, n, w, s in shapes for split in splits]


def candidates(direction: str, M: int, N: int, K: int) -> list[Tile]:
    """Tiles that could win: they fill the GPU, and pad or split not too much."""
    found = []
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    for tile in tiles(direction):
        if tile.block_m > max(16, M) or 4 * tile.block_m < M:
            continue
        columns = N // tile.block_n if direction == "fwd" else K // 128
        programs = -(-M // tile.block_m) * columns * tile.split
        steps = (K // 128 if direction == "fwd" else N // tile.block_n) // tile.split
        if (
            steps >= 2
            and processors // 2 <= programs
            and (tile.split == 1 or programs <= 6 * processors)
        ):
            found.append(tile)
    return found


def call(direction: str, x: torch.Tensor, weight: PortableWeight, tile: Tile) -> torch.Tensor:
    if direction == "fwd":
        return fused_forward(x, weight.packed, weight.absmax, None, weight.N, True, False, tile)
    return fused_dx(x, weight.packed, weight.absmax, weight.K, True, False, tile)


def dequantize_first(direction: str, x: torch.Tensor, weight: PortableWeight) -> torch.Tensor:
    """What dispatch does where no tile is chosen."""
    stored = (weight.packed, weight.absmax, weight.N, weight.K)
    dense = dequantize_tiles(*stored, x.dtype, 64, True)
    return x @ dense.T if direction == "fwd" else x @ dense


def compile_and_check(job: tuple[str, Tile]) -> tuple[str, Tile, float]:
    """Run one tile on a small weight, in a process of its own; the relative error."""
    direction, tile = job
    N, K, M = (512, 2048, 2 * tile.block_m) if direction == "fwd" else (4096, 256, 2 * tile.block_m)
    layer = PortableWeight(random_nf4(N, K, 0))
    weight = layer.weight().dequantize(torch.bfloat16).double()
    x = torch.randn(M, K if direction == "fwd" else N, device="cuda", dtype=torch.bfloat16)
    exact = x.double() @ (weight.T if direction == "fwd" else weight)
    try:
        actual = call(direction, x, layer, tile).double()
    except Exception as error:
        print(f"{direction} {tuple(tile)}: {type(error).__name__}", flush=True)
        return direction, tile, float("inf")
    return direction, tile, ((actual - exact).norm() / exact.norm()).item()


def tune_shape(
    N: int, K: int, working: set[tuple[str, Tile]]
) -> dict[tuple[str, int], Tile | None]:
    """The best tile by direction and bucket; None where dequantising first is faster."""
    layers = [PortableWeight(random_nf4(N, K, seed)) for seed in range(copies(N, K, 0.5625))]
    best: dict[tuple[str, int], Tile | None] = {}
    for direction in ("fwd", "dx"):
        for M in BUCKETS:
            width = K if direction == "fwd" else N
            x = torch.randn(M, width, device="cuda", dtype=torch.bfloat16)

            first = _seconds([partial(dequantize_first, direction, x, layer) for layer in layers])
            ranking: list[tuple[float, Tile | None]] = [(first, None)]
            for tile in candidates(direction, M, N, K):
                if (direction, tile) in working:
                    calls = [partial(call, direction, x, layer, tile) for layer in layers]
                    ranking.append((_seconds(calls), tile))
            ranking.sort(key=lambda entry: entry[0])
            best[direction, M] = ranking[0][1]
            print(
                f"{direction} N={N} K={K} M={M}: {ranking[0][0] * 1e6:.1f} us {ranking[0][1]}, "
                f"dequantise first {first * 1e6:.1f} us, {len(ranking)} tried",
                flush=True,
            )
    return best


def _seconds(calls: list[Callable[[], object]]) -> float:
    times = time_graphs({"": calls}, len(calls), rounds=3)[""]
    return statistics.median(times)


def write(table: dict, target: Path) -> None:
    """Write the table as the module that dispatch reads."""
    head = TARGET.read_text().partition("TUNED")[0]
    kind = "dict[tuple[tuple[int, int], str, int, int, int], tuple[int, int, int, int, int] | None]"
    lines = [f"    {key}: {value and tuple(value)}," for key, value in sorted(table.items())]
    body = "\n".join(lines).replace("'", '"')
    target.write_text(f"{head}TUNED: {kind} = {{\n{body}\n}}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--seconds", type=float, default=1e9, help="start no shape after these")
    args = parser.parse_args()
    begin = time.monotonic()
    jobs = [(direction, tile) for direction in ("fwd", "dx") for tile in tiles(direction)]
    with multiprocessing.get_context("spawn").Pool(max(1, (os.cpu_count() or 2) - 1)) as pool:
        checked = pool.map(compile_and_check, jobs, chunksize=2)
    working = {(direction, tile) for direction, tile, error in checked if error < 4e-3}
    print(f"{len(working)} of {len(jobs)} tiles work, {time.monotonic() - begin:.0f} s", flush=True)
    capability = torch.cuda.get_device_capability()
    table = dict(TUNED)
    for name in args.shapes:
        if time.monotonic() - begin > args.seconds:
            break
        N, K = SHAPES[name]
        for (direction, M), tile in tune_shape(N, K, working).items():
            table[(capability, direction, N, K, M)] = tile
        torch.cuda.empty_cache()
        write(table, Path(os.environ["OUT"]) / TARGET.name if "OUT" in os.environ else TARGET)


if __name__ == "__main__":
    main()
