"""The scan of all layers and the evaluation before and after training, against the published ones.

The published scan runs one word at a time through the whole model, once for every layer. Its
evaluation runs both words of a pair through the base model and through the adapted one. Either does
the same work for each pair: a few are timed, whole, and scaled to all. The engine's figures are of
the whole scan, random pairs, retrieval and the proposal of a layer included, and of the whole
evaluation of both splits, retrieval included; ``tli-engine:forward`` is the scan's words through all
blocks and no more. ``--many`` scans so many pairs once.

python -m bench tli_scan [--model NAME] [--sample N] [--rounds N]
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from bench.engine import engine_evaluation, engine_forward, engine_scan, scan_model
from bench.harness import Row, interleave, print_rows, quantiles_ms, write_results
from bench.models import NAMES, Subject, find, random_split
from bench.published import Tokens, add_adapters, evaluate_pair, padded, scan_pair
from tli_engine.models.device import choose_device

PEERS = ["transformers", "peft", "bitsandbytes"]


def sampled(subject: Subject, pairs: int) -> list[tuple[Tokens, Tokens]]:
    """The first training pairs, one word a batch."""
    train = subject.splits[0]
    words = zip(train.source, train.target, strict=True)
    return [(padded([s]), padded([t])) for s, t in islice(words, pairs)]


def published_scan(subject: Subject, base: Any, sample: int) -> Callable[[], object]:
    """The scan of a few pairs at every layer."""
    pairs, layers = sampled(subject, sample), range(base.config.num_hidden_layers)
    return lambda: [scan_pair(base, *pair, layers) for pair in pairs]


def published_evaluation(subject: Subject, base: Any, sample: int) -> Callable[[], object]:
    """The evaluation of a few pairs."""
    pairs, layer = sampled(subject, sample), subject.config.align.layer
    adapted = add_adapters(subject.causal_lm()).eval()
    return lambda: [evaluate_pair(base, adapted, *p, layer, subject.special) for p in pairs]


def bench_case(
    case: str,
    subject: Subject,
    shape: dict[str, int],
    providers: dict[str, Callable[[], object]],
    sample: int,
    rounds: int,
) -> list[Row]:
    """Time the published procedure on ``sample`` pairs, scaled up, and the engine on all."""
    # a first call may build kernels; of the published procedure one forward has run
    for name in providers.keys() - {"published"}:
        providers[name]()
    times = interleave(providers, dict.fromkeys(providers, rounds), warm_up=0)
    scale = dict.fromkeys(providers, 1.0) | {"published": shape["pairs"] / sample}
    scaled = {name: [t * scale[name] for t in seconds] for name, seconds in times.items()}
    base = statistics.median(scaled["published"])
    rows = [
        Row(
            case, shape, subject.label, name, *quantiles_ms(seconds),
            base / statistics.median(seconds),
            notes={"calls": len(seconds), "scaled_by": scale[name]},
        )
        for name, seconds in scaled.items()
    ]  # fmt: skip
    print_rows(rows)
    return rows


def bench_subject(subject: Subject, sample: int, rounds: int) -> list[Row]:
    """Scan, and evaluation."""
    base = subject.causal_lm()
    scan_pair(base, *sampled(subject, 1)[0], layers=[0])
    layer = subject.config.align.layer
    train, both = len(subject.splits[0].pairs), sum(len(s.pairs) for s in subject.splits)
    model = scan_model(subject)
    scans = {
        "published": published_scan(subject, base, sample),
        "tli-engine": engine_scan(model, subject),
        "tli-engine:forward": engine_forward(model, subject),
    }
    shape = {"pairs": train, "layers": base.config.num_hidden_layers}
    rows = bench_case("scan", subject, shape, scans, sample, rounds)
    # a pair is evaluated at one layer: more of them take no longer
    more = 6 * sample
    evaluations = {
        "published": published_evaluation(subject, base, more),
        "tli-engine": engine_evaluation(subject),
    }
    shape = {"pairs": both, "layer": layer}
    return rows + bench_case("evaluate", subject, shape, evaluations, more, rounds)


def scan_many(subject: Subject, pairs: int) -> None:
    """Scan random words of the model's vocabulary, and print time and memory."""
    split = random_split("many", pairs, subject.files.config, random.Random(0))
    subject = replace(subject, splits=[split])
    model = scan_model(subject)
    on_gpu = subject.device.type == "cuda"
    held = torch.cuda.memory_allocated() / 2**30 if on_gpu else 0.0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    engine_scan(model, subject)()
    seconds = time.perf_counter() - start
    print(f"{pairs} pairs x {model.depth} layers: {seconds:.1f} s")
    if on_gpu:
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(f"GPU memory: {held:.1f} GiB of weights, {peak:.1f} GiB at the peak")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    device = choose_device("auto")
    usual = "llama-3-8b" if device.type == "cuda" else "smollm2-135m"
    parser.add_argument("--model", choices=NAMES, default=usual)
    parser.add_argument("--sample", type=int, default=2, help="pairs of the published scan")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--many", type=int, help="scan so many pairs once, and print what it took")
    args = parser.parse_args()
    if args.many:
        scan_many(find(args.model, device), args.many)
        return
    rows = bench_subject(find(args.model, device), args.sample, args.rounds)
    print(f"written: {write_results('tli_scan', rows, PEERS)}")


if __name__ == "__main__":
    main()
