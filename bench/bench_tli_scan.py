"""The scan of all layers and the evaluation before and after training, against the published ones.

The published scan runs one word at a time through the whole model, once for every layer. Its
evaluation runs both words of a pair through the base model and through the adapted one. Either does
the same work for each pair: a few are timed, whole, and scaled to all. The engine's figures are of
the whole scan, random pairs, retrieval and the proposal of a layer included, and of the whole
evaluation of both splits, retrieval included; ``tli-engine:forward`` is the scan's words through all
blocks and no more. On a GPU each is traced too, and its memory is that of its models and of a call.

``--many`` scans so many pairs once, instead, and writes a file of its own, ``tli_scan_many.json``.

python -m bench tli_scan [--model NAME] [--sample N] [--rounds N] [--many N]
"""

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch

from bench.engine import (
    Floor,
    engine_evaluation,
    engine_forward,
    engine_scan,
    scan_floor,
    scan_model,
)
from bench.harness import (
    Row,
    copy_bandwidth,
    gpu_busy,
    interleave,
    matmul_rate,
    print_rows,
    quantiles_ms,
    write_results,
)
from bench.models import NAMES, Subject, find, random_split
from bench.published import Tokens, add_adapters, evaluate_pair, padded, scan_pair
from tli_engine.models.device import choose_device, peak_mib

PEERS = ["transformers", "peft", "bitsandbytes"]
# bytes and operations a second of a GPU
Speed = tuple[float, float]


@dataclass(frozen=True)
class Provider:
    """A call to time, and what it asks of a GPU; nothing without one.

    Attributes:
        call: The work, or a part of it.
        gpu_ms: Time in which a kernel runs in a call.
        kernels: Of a call.
        peak_mib: GPU memory of its models and of a call, at most.
    """

    call: Callable[[], object]
    gpu_ms: float | None = None
    kernels: int = 0
    peak_mib: float | None = None


def allocated() -> int:
    """Bytes of GPU memory in use."""
    gc.collect()
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def watched(
    call: Callable[[], object],
    before: int,
    traced: bool,
    part: tuple[Callable[[], object], int] | None = None,
) -> Provider:
    """A provider whose kernels are built, traced on a GPU.

    Args:
        call: The work.
        before: Bytes that were allocated when its models were not there.
        traced: Whether to trace it.
        part: What to trace instead, and how many of it are a call: a trace has no room for too many
            kernels.
    """
    on_gpu = torch.cuda.is_available()
    # what others have left is not in its peak
    gc.collect()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    if part is None:
        call()
    if not traced:
        return Provider(call)
    what, times = part or (call, 1)
    if part is not None:
        # what is launched once is not to be multiplied
        what()
    gpu_ms, kernels = gpu_busy(what, calls=1)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if on_gpu else None
    return Provider(call, gpu_ms * times, kernels * times, peak)


def sampled(subject: Subject, pairs: int) -> list[tuple[Tokens, Tokens]]:
    """The first training pairs, one word a batch."""
    train = subject.splits[0]
    words = zip(train.source, train.target, strict=True)
    return [(padded([s]), padded([t])) for s, t in islice(words, pairs)]


def published_scan(subject: Subject, base: Any, sample: int) -> Callable[[int], object]:
    """The scan of a few pairs at every layer, ``sample`` at most."""
    pairs, layers = sampled(subject, sample), range(base.config.num_hidden_layers)
    return lambda count: [scan_pair(base, *pair, layers) for pair in pairs[:count]]


def published_evaluation(subject: Subject, base: Any, sample: int) -> Callable[[int], object]:
    """The evaluation of a few pairs, ``sample`` at most."""
    pairs, layer = sampled(subject, sample), subject.config.align.layer
    adapted = add_adapters(subject.causal_lm()).eval()
    special = subject.special
    return lambda count: [evaluate_pair(base, adapted, *p, layer, special) for p in pairs[:count]]


def bench_case(
    case: str,
    subject: Subject,
    shape: dict[str, int],
    providers: Mapping[str, Provider],
    sample: int,
    rounds: int,
) -> list[Row]:
    """Time the published procedure on ``sample`` pairs, scaled up, and the engine on all."""
    calls = {name: provider.call for name, provider in providers.items()}
    times = interleave(calls, dict.fromkeys(calls, rounds), warm_up=0)
    scale = dict.fromkeys(providers, 1.0) | {"published": shape["pairs"] / sample}
    scaled = {name: [t * scale[name] for t in seconds] for name, seconds in times.items()}
    base = statistics.median(scaled["published"])
    rows = []
    for name, seconds in scaled.items():
        row = Row(
            case, shape, subject.label, name, *quantiles_ms(seconds),
            base / statistics.median(seconds), peak_mib=providers[name].peak_mib,
            notes={"calls": len(seconds), "scaled_by": scale[name]},
        )  # fmt: skip
        if (busy_ms := providers[name].gpu_ms) is not None:
            row.notes["kernels"] = round(providers[name].kernels * scale[name])
            row = replace(row, gpu_ms=busy_ms * scale[name])
        rows.append(row)
    return rows


def with_floor(row: Row, floor: Floor, speed: Speed) -> Row:
    """The row, its floor beside it."""
    share = floor.seconds(*speed) / (row.ms / 1e3)
    return replace(row, roofline=share, bytes=floor.bytes, flops=floor.flops)


def bench_scan(
    subject: Subject, base: Any, before: int, sample: int, rounds: int, speed: Speed | None
) -> list[Row]:
    """The scan; ``before`` are the bytes allocated when ``base`` was not there."""
    traced = speed is not None
    layers, call = base.config.num_hidden_layers, published_scan(subject, base, sample)
    # a pair takes as many launches at one layer as at another: of all of them they are too many
    part = partial(scan_pair, base, *sampled(subject, 1)[0], [0]), sample * layers
    published = watched(partial(call, sample), before, traced, part)
    before = allocated()
    model = scan_model(subject)
    providers = {
        "published": published,
        "tli-engine": watched(engine_scan(model, subject), before, traced),
        "tli-engine:forward": watched(engine_forward(model, subject), before, traced),
    }
    shape = {"pairs": len(subject.splits[0].pairs), "layers": layers}
    rows = bench_case("scan", subject, shape, providers, sample, rounds)
    if speed is not None:
        floor = scan_floor(subject)
        rows = [with_floor(row, floor, speed) for row in rows]
    print_rows(rows)
    return rows


def bench_evaluation(
    subject: Subject, base: Any, before: int, sample: int, rounds: int, traced: bool
) -> list[Row]:
    """The evaluation; ``before`` are the bytes allocated when ``base`` was not there."""
    call = published_evaluation(subject, base, sample)
    part = partial(call, 1), sample
    providers = {"published": watched(partial(call, sample), before, traced, part)}
    before = allocated()
    providers["tli-engine"] = watched(engine_evaluation(subject), before, traced)
    pairs = sum(len(s.pairs) for s in subject.splits)
    shape = {"pairs": pairs, "layer": subject.config.align.layer}
    rows = bench_case("evaluate", subject, shape, providers, sample, rounds)
    print_rows(rows)
    return rows


def bench_subject(subject: Subject, sample: int, rounds: int, speed: Speed | None) -> list[Row]:
    """Scan, and evaluation; ``speed`` is bandwidth and matmul rate of a GPU."""
    before = allocated()
    base = subject.causal_lm()
    scan_pair(base, *sampled(subject, 1)[0], layers=[0])
    rows = bench_scan(subject, base, before, sample, rounds, speed)
    # a pair is evaluated at one layer: more of them take no longer
    traced = speed is not None
    return rows + bench_evaluation(subject, base, before, 6 * sample, rounds, traced)


def scan_many(subject: Subject, pairs: int) -> Row:
    """Scan random words of the model's vocabulary once; kernels are built in it."""
    split = random_split("many", pairs, subject.files.config, random.Random(0))
    subject = replace(subject, splits=[split])
    before = allocated()
    model = scan_model(subject)
    weights = allocated() - before
    if subject.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    engine_scan(model, subject)()
    seconds = time.perf_counter() - start
    shape = {"pairs": pairs, "words": 2 * pairs, "layers": model.depth}
    host = peak_mib(torch.device("cpu"))
    row = Row(
        "many", shape, subject.label, "tli-engine", *quantiles_ms([seconds]), 1.0,
        peak_mib=peak_mib(subject.device), notes={"weights_mib": weights / 2**20, "host_mib": host},
    )  # fmt: skip
    print_rows([row])
    print(f"peak {row.peak_mib:,.0f} MiB, the process on the host {host:,.0f} MiB")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    device = choose_device("auto")
    usual = "llama-3-8b" if device.type == "cuda" else "smollm2-135m"
    parser.add_argument("--model", choices=NAMES, default=usual)
    parser.add_argument("--sample", type=int, default=2, help="pairs of the published scan")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--many", type=int, help="scan so many pairs once, and nothing else")
    args = parser.parse_args()
    subject = find(args.model, device)
    if args.many:
        print(f"written: {write_results('tli_scan_many', [scan_many(subject, args.many)], [])}")
        return
    speed = (copy_bandwidth(), matmul_rate()) if device.type == "cuda" else None
    facts = {} if speed is None else dict(zip(("bandwidth", "flops_per_s"), speed, strict=True))
    rows = bench_subject(subject, args.sample, args.rounds, speed)
    print(f"written: {write_results('tli_scan', rows, PEERS, **facts)}")


if __name__ == "__main__":
    main()
