"""The training step of the paper's recipe: wall time, the time the GPU is busy in it, and kernels.

``published`` is the published procedure: both languages of a batch, padded, through every block and
the LM head. ``peft+bitsandbytes`` (without NF4, ``peft``) is the same cut down to the blocks that
the loss needs, which takes a few lines. ``tli-engine:fast`` and ``:bf16`` are the engine with other
numerics and with its weights resident in bf16; on a CPU, where ``tli-engine`` runs transformers'
modules on packed words, ``:fused`` runs the engine's own blocks. All hold the same weights, train on the same batches, and
must give the same loss at the first step. Tokenising is in none. On a GPU the models are of random
weights, in NF4, and Qwen2-72B's shape is for the engine alone; on a CPU it is SmolLM2.

``training`` is the whole recipe, 5 epochs of 623 pairs, from the first step to the last, kernels built
and graphs captured in it. ``[--models NAME ...] [--pairs N ...] [--rounds N] [--no-training] [--keep]``
"""

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch

from bench.engine import Floor, batch_tokens, engine_step, engine_trainer
from bench.harness import (
    Row,
    copy_bandwidth,
    earlier_rows,
    gpu_busy,
    interleave,
    matmul_rate,
    print_rows,
    quantiles_ms,
    write_results,
)
from bench.models import NAMES, Subject, find
from bench.published import Training, add_adapters, exit_early, padded
from tli_engine.config import RunConfig
from tli_engine.models.device import choose_device
from tli_engine.train.order import batch_rows

PEERS = ["transformers", "peft", "bitsandbytes"]
WARM_UP = 4
# steps of the schedule, more than are run
STEPS = 5000
# too large to be trained by the peers beside the engine
ALONE = ("qwen2-72b",)
# a step that computes the same up to rounding gives this loss, absolute
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Provider:
    """A step that has run some times.

    Attributes:
        step: One more call.
        loss: What the first step gave.
        peak_mib: GPU memory of the model and of a step, at most.
        steps: Steps in a call.
    """

    step: Callable[[], float]
    loss: float
    peak_mib: float | None
    steps: int


def warm(build: Callable[[], tuple[Callable[[], float], int]]) -> Provider:
    """Build a provider and run its first steps; what building takes for a moment is no peak."""
    on_gpu = torch.cuda.is_available()
    gc.collect()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    step, steps = build()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    loss, *_ = [step() for _ in range(WARM_UP)]
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if on_gpu else None
    return Provider(step, loss, peak, steps)


def published_step(
    subject: Subject, config: RunConfig, cut: bool
) -> tuple[Callable[[], float], int]:
    """The published step on the engine's batches, ``cut`` down to the blocks it needs or not."""
    layer, train = config.align.layer, subject.splits[0]
    model = subject.causal_lm(layer if cut else None)
    if cut:
        exit_early(model, layer)
    training = Training(add_adapters(model, config.lora.dropout).train(), STEPS, layer)
    steps = count()

    def step() -> float:
        rows = batch_rows(len(train.pairs), config.train.batch_size, config.seed, next(steps))
        sides = (padded([side[i] for i in rows]) for side in (train.source, train.target))
        return training.step(*sides)

    return step, 1


def make_providers(subject: Subject, config: RunConfig) -> tuple[dict[str, Provider], Floor]:
    """Every provider, warm, the baseline first; and the floor of a step."""
    floor: list[Floor] = []

    def engine(**choice: Any) -> tuple[Callable[[], float], int]:
        step, steps, found = engine_step(subject, config.model_copy(update=choice))
        floor.append(found)
        return step, steps

    builds: dict[str, Callable[[], tuple[Callable[[], float], int]]] = {}
    if subject.name not in ALONE:
        builds["published"] = lambda: published_step(subject, config, cut=False)
        peer = "peft+bitsandbytes" if subject.nf4 else "peft"
        builds[peer] = lambda: published_step(subject, config, cut=True)
    builds["tli-engine"] = engine
    if subject.device.type == "cuda":
        builds["tli-engine:fast"] = lambda: engine(numerics="fast")
        builds["tli-engine:bf16"] = lambda: engine(weight_residency="bf16")
    else:
        fused = config.train.model_copy(update={"engine": "fused"})
        builds["tli-engine:fused"] = lambda: engine(train=fused)
    providers = {name: warm(build) for name, build in builds.items()}
    losses = {name: provider.loss for name, provider in providers.items()}
    print(f"{subject.label}: loss of the first step: {losses}")
    if max(losses.values()) - min(losses.values()) > _TOLERANCE[subject.dtype]:
        raise SystemExit(f"{subject.label}: the first losses differ: {losses}; not timed")
    return providers, floor[0]


def bench_case(
    subject: Subject, pairs: int, rounds: int, speed: tuple[float, float] | None
) -> list[Row]:
    """Time the step on batches of ``pairs``; ``speed`` is bandwidth and matmul rate of a GPU."""
    train = subject.config.train.model_copy(
        update={"batch_size": pairs, "steps": STEPS, "epochs": None}
    )
    subject = subject.in_whole_batches(pairs)
    config = subject.config.model_copy(update={"train": train})
    providers, floor = make_providers(subject, config)
    calls = {name: p.step for name, p in providers.items()}
    slow = {"published": rounds}
    times = interleave(calls, {name: slow.get(name, 4 * rounds) for name in calls}, warm_up=0)
    shape = {"pairs": pairs, "tokens": batch_tokens(subject, config), "layer": config.align.layer}
    first = next(iter(times))
    base = statistics.median(times[first]) / providers[first].steps
    rows = []
    for name, calls_s in times.items():
        seconds = [s / providers[name].steps for s in calls_s]
        median = statistics.median(seconds)
        row = Row(
            "step", shape, subject.label, name, *quantiles_ms(seconds), base / median,
            peak_mib=providers[name].peak_mib, notes={"calls": len(seconds)},
        )  # fmt: skip
        if speed is not None:
            busy_ms, kernels = (n / providers[name].steps for n in gpu_busy(calls[name]))
            row.notes["kernels"] = round(kernels)
            row = replace(
                row, gpu_ms=busy_ms, roofline=floor.seconds(*speed) / median,
                bytes=floor.bytes, flops=floor.flops,
            )  # fmt: skip
        rows.append(row)
    print_rows(rows)
    return rows


def bench_training(subject: Subject, runs: int = 2) -> Row:
    """Time the recipe as a whole, ``runs`` times; kernels that a GPU lacks are built in the first."""
    on_gpu = subject.device.type == "cuda"
    seconds, peaks, steps = [], [], 0
    for _ in range(runs):
        gc.collect()
        before = torch.cuda.memory_allocated() if on_gpu else 0
        trainer = engine_trainer(subject, subject.config)
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        trainer.run()
        seconds.append(time.perf_counter() - start)
        steps = trainer.total_steps
        peaks.append((torch.cuda.max_memory_allocated() - before) / 2**20 if on_gpu else None)
        # its memory is not the next one's
        del trainer
    pairs = len(subject.splits[0].pairs)
    shape = {"pairs": pairs, "steps": steps, "layer": subject.config.align.layer}
    row = Row(
        "training", shape, subject.label, "tli-engine", *quantiles_ms(seconds[1:] or seconds), 1.0,
        peak_mib=peaks[-1], notes={"first_run_s": seconds[0]},
    )  # fmt: skip
    print_rows([row])
    print(f"peak {row.peak_mib and round(row.peak_mib)} MiB, first run {seconds[0]:.2f} s")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    device = choose_device("auto")
    on_gpu = device.type == "cuda"
    usual = ["llama-3-8b", "qwen2-72b"] if on_gpu else ["smollm2-135m"]
    parser.add_argument("--models", nargs="+", choices=NAMES, default=usual)
    parser.add_argument(
        "--pairs",
        nargs="+",
        type=int,
        default=[8, 32, 512] if on_gpu else [8],
        help="pairs of a batch",
    )
    parser.add_argument("--rounds", type=int, default=12, help="published steps to time")
    parser.add_argument("--no-training", action="store_true", help="leave the whole recipe out")
    parser.add_argument("--keep", action="store_true", help="keep earlier rows of other batches")
    args = parser.parse_args()
    speed = (copy_bandwidth(), matmul_rate()) if on_gpu else None
    facts = {} if speed is None else dict(zip(("bandwidth", "flops_per_s"), speed, strict=True))
    rows = earlier_rows("tli_step") if args.keep else []
    for model, pairs in itertools.product(args.models, args.pairs):
        rows = replaced(rows, bench_case(find(model, device), pairs, args.rounds, speed))
        path = write_results("tli_step", rows, PEERS, **facts)
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    for model in [] if args.no_training else args.models:
        rows = replaced(rows, [bench_training(find(model, device))])
        path = write_results("tli_step", rows, PEERS, **facts)
    print(f"written: {path}")


def replaced(rows: list[Row], new: list[Row]) -> list[Row]:
    """``rows`` with ``new`` in the place of those of the same case, model and number of pairs."""

    def batch(row: Row) -> tuple[str, str, int]:
        return row.case, row.model, row.shape["pairs"]

    batches = {batch(row) for row in new}
    at = next((i for i, row in enumerate(rows) if batch(row) in batches), len(rows))
    kept = [[r for r in part if batch(r) not in batches] for part in (rows[:at], rows[at:])]
    return [*kept[0], *new, *kept[1]]


if __name__ == "__main__":
    main()
