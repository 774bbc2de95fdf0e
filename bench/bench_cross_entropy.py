"""Cross-entropy of rows of logits and its gradient: milliseconds of GPU time, and memory beside them.

Peers run forward and backward: ``torch.nn.functional.cross_entropy`` on logits cast to fp32, as in
transformers' loss (the baseline), compiled, or on bf16, where the losses are bf16 too; and Liger's, which
also writes the gradient over the logits. Their loss is the sum, so that none divides. Liger's backward
waits for the GPU, which no graph can capture: launches are timed one by one. What overwrites the logits
finds its own gradient there the next time, which takes no other time. The floor is the logits read once
and written once, at the speed of a copy on this GPU.

python -m bench cross_entropy [--shapes NAME ...] [--rows L ...] [--sweep]
"""

import argparse
import itertools
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bench.harness import Row, copy_bandwidth, print_gpu_rows, time_launches, write_results
from bench.nf4_shapes import rows_of
from bench.pointwise import compiled, load_liger
from tli_engine.kernels.cross_entropy_rows import Tile, launch, tile_for
from tli_engine.ops.cross_entropy_rows import cross_entropy_rows_

SHAPES = {"8b": 128256, "qwen2-72b": 152064}
ROWS = (1024, 4096)
BASELINE = "torch"
_CHECKED = 64
# loss, a number, and gradient, from logits and targets
Function = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def make_inputs(L: int, V: int) -> tuple[Tensor, Tensor]:
    """Logits, bf16, and targets."""
    logits = torch.randn(L, V, device="cuda", dtype=torch.bfloat16) * 3
    return logits, torch.randint(0, V, (L,), device="cuda")


def by_autograd(loss_of: Callable[[Tensor, Tensor], Tensor]) -> Function:
    """Forward and backward of a peer."""

    def call(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        leaf = logits.detach().requires_grad_()
        loss = loss_of(leaf, targets)
        return loss.detach(), *torch.autograd.grad(loss, leaf)

    return call


def in_place(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The engine's."""
    return cross_entropy_rows_(logits, targets).sum(), logits


def providers() -> dict[str, Function]:
    """All that are there."""

    def upcast(logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits.float(), targets, reduction="sum")

    def narrow(logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits, targets, reduction="sum")

    found = {
        BASELINE: by_autograd(upcast),
        "compiled": by_autograd(compiled(upcast)),
        "torch:bf16": by_autograd(narrow),
    }
    liger = load_liger("cross_entropy", "LigerCrossEntropyFunction")
    if liger is not None:
        from liger_kernel.transformers.functional import liger_cross_entropy

        found["liger"] = by_autograd(partial(liger_cross_entropy, reduction="sum"))
    return found | {"tli-engine": in_place}


def check(found: dict[str, Function], V: int) -> None:
    """Stop unless loss and gradient are those of fp64 up to rounding."""
    logits, targets = make_inputs(_CHECKED, V)
    exact = by_autograd(partial(cross_entropy, reduction="sum"))(logits.double(), targets)
    for name, function in found.items():
        actual = function(logits.clone(), targets)
        for x, y in zip(actual, exact, strict=True):
            error = (x.double() - y).norm() / y.norm()
            if not error < 2e-2:
                raise SystemExit(f"{name}: relative error {error:.1e}; not timed")


def peak_of(call: Callable[[], object]) -> float:
    """MiB that a call takes beside its inputs."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def bench_case(model: str, L: int, bandwidth: float) -> list[Row]:
    """Forward and backward of so many rows."""
    V = SHAPES[model]
    found = providers()
    check(found, V)
    logits, targets = make_inputs(L, V)
    # each on logits of its own, which are more than the L2 cache holds
    calls = {name: partial(function, logits.clone(), targets) for name, function in found.items()}
    for call in calls.values():
        # compiled here, not while memory is measured
        call()
    peaks = {name: peak_of(call) for name, call in calls.items()}
    times = time_launches({name: [call] for name, call in calls.items()}, 5, rounds=15)
    nbytes = 2 * logits.nbytes
    shape = {"L": L, "V": V}
    floor = nbytes / bandwidth
    rows = rows_of("fwd+bwd", shape, model, times, BASELINE, floor, bytes=nbytes)
    rows = [replace(row, peak_mib=peaks[row.provider]) for row in rows]
    print_gpu_rows(rows)
    for row in rows:
        print(f"{row.provider:20} {row.peak_mib:9.1f} MiB beside the logits")
    return rows


def sweep(model: str, L: int) -> None:
    """Print the time of every tile, the launcher's choice first."""
    V = SHAPES[model]
    logits, targets = make_inputs(L, V)
    sizes = itertools.product((512, 1024, 2048, 4096, 8192), (4, 8, 16, 32))
    for tile in dict.fromkeys((tile_for(V, logits.dtype), *(Tile(*size) for size in sizes))):
        call = partial(launch, logits, targets, tile)
        seconds = time_launches({"": [call]}, 5, rounds=5)[""]
        print(f"{model} L={L} {tuple(tile)}: {statistics.median(seconds) * 1e6:.1f} us", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--sweep", action="store_true", help="time every tile instead")
    args = parser.parse_args()
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    torch.cuda.empty_cache()
    rows: list[Row] = []
    for model, L in itertools.product(args.shapes, args.rows):
        if args.sweep:
            sweep(model, L)
        else:
            rows += bench_case(model, L, bandwidth)
        torch.cuda.empty_cache()
    if rows:
        path = write_results("cross_entropy", rows, ["liger-kernel"], copy_bytes_per_s=bandwidth)
        print(f"written: {path}")


if __name__ == "__main__":
    main()
