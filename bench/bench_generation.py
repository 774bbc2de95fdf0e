"""Greedy generation, from token ids on the host to token ids on the host.

Random weights of a model's shape, NF4 with a doubly quantised absmax or bf16; random prompts, all of
one length, and no token that ends a text. ``transformers`` is ``generate`` with its dynamic cache,
``:static`` with a static cache and the step compiled, as ``generate`` does by itself then;
``+bitsandbytes`` has NF4 weights, the same bytes as ``tli-engine``. ``tli-engine:bf16`` has no NF4.

A step's time is that of a long continuation less that of one token, a step each: the prompts' own run
is beside it. Peak memory is of the whole. The share of the floor is that of reading each weight once,
and keys and values, at the rate of a copy. What follows the first prompt must agree between those with
the same weights: where it does not, a row says so. Results are written after every row.

python -m bench generation [--providers ...] [--batches N ...] [--layers N] [--prompt N] [--tokens N]
    [--budget S]
"""

import argparse
import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.generation_cases import (
    BASELINE,
    PROVIDERS,
    Provider,
    Writer,
    generation_subject,
    jobs,
    random_prompts,
    step_bytes,
    writer_of,
)
from bench.harness import Row, copy_bandwidth, gpu_busy, quantiles_ms, write_results
from bench.train_cases import NAMES, train_config
from tli_engine.models.device import choose_device

PEERS = ["transformers", "bitsandbytes", "accelerate"]
_TRACED = 8
# of the norm of the logits: bf16 through 32 blocks of random weights, by other kernels, came to 7e-2, with
# weights rounded once more (fast) to 1.1e-1 (H100); what has nothing in common is off by 1.4
_TOLERANCE = 0.15


def seconds_of(write: Any, rounds: int) -> list[float]:
    """Times of calls, each to the end of its work."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        write()
        times.append(time.perf_counter() - start)
    return times


def measure(
    writer: Writer, provider: Provider, config: Any, args: argparse.Namespace, batch: int
) -> Row:
    """Time a provider on some texts; the ratio and the share of the floor are for others to fill in."""
    prompts = random_prompts(config, batch, args.prompt)
    on_gpu = torch.cuda.is_available()
    start = time.perf_counter()
    # kernels are built, and graphs recorded: a compiled step is in its third run
    for tokens in (1, 4, 4):
        writer.write(prompts, tokens)
    warm_s = time.perf_counter() - start
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    found = writer.write(prompts, args.tokens)
    if {len(text) for text in found} != {args.tokens}:
        raise SystemExit(f"{provider.name}: texts of other lengths than {args.tokens}; not timed")
    first = statistics.median(seconds_of(partial(writer.write, prompts, 1), 3))
    whole = seconds_of(partial(writer.write, prompts, args.tokens), args.rounds)
    steps = [(s - first) / (args.tokens - 1) for s in whole]
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None
    gpu, kernels = _traced(writer, prompts) if on_gpu else (None, None)
    seen = args.prompt + args.tokens / 2
    nbytes = step_bytes(config, batch, seen, nf4=provider.nf4, element=2 if on_gpu else 4)
    notes = {
        "tokens_per_s": round(batch / statistics.median(steps), 1),
        "tokens_per_s_with_prompts": round(batch * args.tokens / statistics.median(whole), 1),
        "prompts_ms": round(first * 1e3, 2),
        "kernels": kernels,
        "warm_up_s": round(warm_s, 1),
    }
    shape = {"batch": batch, "prompt": args.prompt, "tokens": args.tokens}
    return Row(
        "decode", shape, f"{args.model}{'' if args.layers is None else f':{args.layers}'}",
        provider.name, *quantiles_ms(steps), 1.0, peak_mib=peak, bytes=nbytes, gpu_ms=gpu,
        notes=notes,
    )  # fmt: skip


def _traced(writer: Writer, prompts: Sequence[tuple[int, ...]]) -> tuple[float, int]:
    """Time in which the GPU is busy in a step, ms, and kernels of a step."""
    long, many = gpu_busy(partial(writer.write, prompts, 1 + _TRACED), 1)
    short, few = gpu_busy(partial(writer.write, prompts, 1), 1)
    return (long - short) / _TRACED, round((many - few) / _TRACED)


def compared(rows: Sequence[Row], bandwidth: float | None) -> list[Row]:
    """The rows with their ratios to the baseline of their batch, and shares of the floor."""
    base = {r.shape["batch"]: r.ms for r in rows if r.provider == BASELINE}
    result = []
    for row in rows:
        ratio = base.get(row.shape["batch"], row.ms) / row.ms
        floor = None
        if bandwidth is not None and row.bytes is not None:
            floor = row.bytes / bandwidth / (row.ms / 1e3)
        result.append(replace(row, ratio_to_baseline=ratio, roofline=floor))
    return result


def off_by(logits: Tensor, others: Tensor) -> float:
    """How far logits are from others, of their norm."""
    return ((logits - others).norm() / others.norm()).item()


def print_row(row: Row) -> None:
    """One line for a person."""
    spread = f"[{row.ms_p20:.2f}, {row.ms_p80:.2f}]"
    gpu = "" if row.gpu_ms is None else f"GPU busy {row.gpu_ms:6.2f} ms"
    peak = "" if row.peak_mib is None else f"{row.peak_mib / 1024:6.2f} GiB"
    floor = "" if row.roofline is None else f"{row.roofline:5.2f} of floor"
    off = row.notes.get("logits_off_by")
    print(
        f"batch {row.shape['batch']:3} {row.provider:26} {row.notes['tokens_per_s']:9.1f} tokens/s "
        f"{row.ms:8.3f} ms a step {spread:18} {row.ratio_to_baseline:6.2f} x {gpu} {peak} {floor} "
        f"prompts {row.notes['prompts_ms']:.0f} ms, {row.notes['kernels']} kernels"
        + ("" if off is None or off <= _TOLERANCE else f" THE LOGITS ARE OFF BY {off:.1e}"),
        flush=True,
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--model", choices=NAMES, default="llama-3-8b" if on_gpu else "tiny")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--batches", nargs="+", type=int, default=[16, 1])
    parser.add_argument("--layers", type=int, help="first blocks alone; all by default")
    parser.add_argument("--prompt", type=int, default=512 if on_gpu else 16, help="tokens of each")
    parser.add_argument("--tokens", type=int, default=64 if on_gpu else 6, help="new ones of each")
    parser.add_argument("--rounds", type=int, default=2, help="long continuations to time")
    parser.add_argument("--budget", type=float, help="seconds after which no row is begun")
    return parser.parse_args()


def main() -> None:
    args, device = arguments(), choose_device("auto")
    start, bandwidth = time.perf_counter(), None
    if device.type == "cuda":
        bandwidth = copy_bandwidth()
        torch.cuda.empty_cache()
    rows: list[Row] = []
    absent: list[dict[str, Any]] = []
    logits: dict[bool, Tensor] = {}
    held: tuple[Provider, Writer] | None = None
    config = train_config(args.model)
    for provider, batch in jobs(args.providers, args.batches):
        if args.budget is not None and time.perf_counter() - start >= args.budget:
            absent.append({"provider": provider.name, "batch": batch, "reason": "no time left"})
            continue
        if held is None or held[0] != provider:
            held = None
            _let_go()
            subject = generation_subject(args.model, args.layers, device, provider)
            config = subject.files.config
            held = provider, writer_of(subject, provider, args.prompt + args.tokens)
        try:
            row = measure(held[1], provider, config, args, batch)
        except Exception as error:
            # a peer that cannot be compiled, say, is left out, and said to be
            reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"
            absent.append({"provider": provider.name, "batch": batch, "reason": reason})
            print(f"batch {batch:3} {provider.name:26} not measured: {reason}", flush=True)
            held = None
            continue
        found = held[1].logits(random_prompts(config, 1, args.prompt))
        off = off_by(found, logits.setdefault(provider.nf4, found))
        row.notes["logits_off_by"] = off
        rows = compared([*rows, row], bandwidth)
        print_row(rows[-1])
        write_results("generation", rows, PEERS, bytes_per_s=bandwidth, absent=absent)
    path = write_results("generation", rows, PEERS, bytes_per_s=bandwidth, absent=absent)
    print(f"written: {path}, {time.perf_counter() - start:.0f} s")


def _let_go() -> None:
    """Free what a provider held, compiled steps and their graphs too."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
