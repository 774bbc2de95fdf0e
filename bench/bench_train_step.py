"""The step of supervised fine-tuning, from one batch on the host to the next.

Adapters of rank 16 on all seven projections of blocks 0-2 (``lora_early``) or of every block
(``lora_all``), or every weight (``full``); random tokens, all of them labels, random weights of a
model's shape. NF4 weights are double quantised, the same bytes for everyone; the output layer and the
embeddings are bf16. Peers keep norms and adapters in bf16 without autocast, their fastest way, with
gradient checkpointing or, ``:save``, without; the engine's ``tli-engine`` keeps of activations what
fits, ``:12-gib`` what fits into so much (``:79-gib``: into a GPU of 80 GB), ``-in-4`` with a batch cut into four whose gradients are added
up, ``:bf16`` has its weights in bf16, ``:fp32`` computes in fp32 with the same NF4 weights; of smaller models ``:graphs`` replays a step's launches from CUDA
graphs, ``:launches`` makes them one by one, where ``tli-engine`` goes by its own rule. Full fine-tuning
of the peers is in bf16 alone, which is what ``tli-engine:stochastic`` rounds at random; ``tli-engine``
has fp32 master weights. torchtune has no row: ``bench/LOG.md`` says why. On the 8B shape optimizer
states are 8-bit.

Each provider runs in a process of its own, one after the other. The first steps are dropped; a step's
time is by a clock on the wall, from one step to the next, and a loss is read when the next step has
been launched, so that nobody's GPU waits for the host to read it; beside it stands the time in which
the GPU is busy. The share of the floor is
that of a step without recomputation at the rate of an 8192^3 product. Losses must agree, of the first
step and of those after updates, with those of ``:fp32``, or of the first row where it did not run: one
that does not is said to. The results are written after every provider.

python -m bench train_step [--cases ...] [--models ...] [--providers ...] [--steps N] [--limit S]
    [--budget S] [--keep] [--fp32-absmax] [--rows N] [--length N]
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.harness import RESULTS, Row, device_name, matmul_rate, quantiles_ms, write_results
from bench.train_cases import (
    CASES,
    NAMES,
    PROVIDER_NAMES,
    Case,
    providers_of,
    train_config,
    train_floor,
)
from bench.train_worker import WARM_UP, Job, Report, run_apart

PEERS = ["transformers", "peft", "bitsandbytes", "liger-kernel", "unsloth", "unsloth_zoo"]
# cases that are measured on a model where none are named
USUAL = {
    "llama-3-8b": ("lora_early", "lora_all", "full"),
    "qwen2-1.5b": ("lora_early", "full"),
    "smollm2-135m": ("lora_early", "lora_all", "full"),
    "qwen2-72b": ("lora_early",),
    "tiny": ("lora_early", "lora_all", "full"),
}
# whose losses the others' are compared with
TRUTH = "tli-engine:fp32"
# rows of 2,048 tokens
_ROWS = {"qwen2-72b": 2}
# nats; the mean over thousands of tokens, of logits whose rounding errors have no sign
_TOLERANCE = 5e-3
# after updates, which rounding moves too
_LATER = 2e-2


def row_of(job: Job, case: Case, report: Report, rate: float | None) -> Row:
    """A row of results; ``rate`` is of products on this GPU."""
    floor = train_floor(train_config(job.model), job.rows, job.length, case)
    tokens, median = job.rows * job.length, statistics.median(report.seconds)
    notes: dict[str, Any] = {
        "tokens_per_s": round(tokens / median, 1),
        "steps": len(report.seconds),
        "losses": [round(loss, 5) for loss in report.losses],
        "trained": report.trained,
        "build_s": round(report.build_s, 1),
        "first_step_s": round(report.first_s, 2),
        "held_mib": report.held_mib,
        "reserved_mib": report.reserved_mib,
        "retries": report.retries,
        "kernels": report.kernels,
        # rows of other runs may be kept beside
        "flops_per_s": rate,
    }
    return Row(
        job.case, {"rows": job.rows, "length": job.length}, job.model, job.provider,
        *quantiles_ms(report.seconds), 1.0, peak_mib=report.peak_mib,
        roofline=None if rate is None else floor.seconds(1.0, rate) / median,
        flops=floor.flops, gpu_ms=report.gpu_ms, notes=notes,
    )  # fmt: skip


def group_of(row: Row) -> tuple[str, str]:
    """Rows of one case on one model are compared."""
    return row.model, row.case


def compared(rows: Sequence[Row]) -> list[Row]:
    """The rows with their ratios, each to the first of its group; losses that differ are noted."""
    result = []
    for row in rows:
        of_group = [r for r in rows if group_of(r) == group_of(row)]
        first = of_group[0]
        truth = next((r for r in of_group if r.provider == TRUTH), first)
        both = zip(row.notes["losses"], truth.notes["losses"], strict=False)
        off, *later = [abs(ours - theirs) for ours, theirs in both]
        notes = {k: v for k, v in row.notes.items() if k not in ("loss_off_by", "losses_apart")}
        # weights in bf16 are not those in NF4
        alike = "bf16" not in row.provider
        if alike and not off <= _TOLERANCE:
            notes["loss_off_by"] = round(off, 5)
        # updates that are rounded at random are others
        if alike and "stochastic" not in row.provider and not max(later, default=0) <= _LATER:
            notes["losses_apart"] = round(max(later), 5)
        result.append(replace(row, ratio_to_baseline=first.ms / row.ms, notes=notes))
    return result


def print_row(row: Row) -> None:
    """One line for a person."""
    spread = f"[{row.ms_p20:.1f}, {row.ms_p80:.1f}]"
    peak = "" if row.peak_mib is None else f"{row.peak_mib / 1024:6.2f} GiB"
    gpu = "" if row.gpu_ms is None else f"GPU busy {row.gpu_ms:8.1f} ms"
    floor = "" if row.roofline is None else f"{row.roofline:5.2f} of floor"
    off, apart = row.notes.get("loss_off_by"), row.notes.get("losses_apart")
    print(
        f"{row.case:10} {row.model:11} {row.provider:32} {row.notes['tokens_per_s']:9.0f} tokens/s "
        f"{row.ms:8.1f} ms {spread:18} {row.ratio_to_baseline:5.2f} x {peak} {gpu} {floor}"
        + ("" if off is None else f" THE FIRST LOSS IS OFF BY {off}")
        + (f" LOSSES AFTER UPDATES ARE APART BY {apart}" if apart else ""),
        flush=True,
    )


def print_summary(rows: Sequence[Row]) -> None:
    """The engine's rows against the fastest peer of their case, and early adapters against full."""
    for group in dict.fromkeys(map(group_of, rows)):
        of_group = [r for r in rows if group_of(r) == group]
        peers = [
            r for r in of_group
            if not r.provider.startswith("tli-engine") and "loss_off_by" not in r.notes
        ]  # fmt: skip
        ours = [r for r in of_group if r.provider.startswith("tli-engine") and r.provider != TRUTH]
        if not peers or not ours:
            continue
        best = min(peers, key=lambda row: row.ms)
        print(f"{group[1]} on {group[0]}: the fastest peer is {best.provider}")
        for row in ours:
            print(f"  {row.provider:32} {best.ms / row.ms:5.2f} x")
    by_key = {(r.model, r.case, r.provider): r for r in rows if r.provider.startswith("tli-engine")}
    for (model, case, provider), early in by_key.items():
        full = by_key.get((model, "full", provider))
        if case == "lora_early" and full is not None:
            line = f"{case} against full on {model}, {provider}: {full.ms / early.ms:.2f} x the tokens/s"
            if early.peak_mib and full.peak_mib:
                line += f", {early.peak_mib / full.peak_mib:.2f} of the memory"
            print(line)


def kept_rows(path: Path, groups: Iterable[tuple[str, str]]) -> list[Row]:
    """Rows of earlier runs, but for those of ``groups``, which are measured anew."""
    if not path.is_file():
        return []
    rows = [Row(**row) for row in json.loads(path.read_text())["rows"]]
    return [row for row in rows if group_of(row) not in set(groups)]


def chosen_jobs(args: argparse.Namespace) -> list[Job]:
    """Every provider to measure, in order."""
    jobs = []
    for model, name in itertools.product(args.models, CASES):
        if name not in (args.cases or USUAL[model]):
            continue
        jobs += [
            Job(
                model, name, provider.name, args.rows or _ROWS.get(model, 4), args.length,
                args.steps, args.limit, not args.fp32_absmax,
            )
            for provider in providers_of(CASES[name], model)
            if not args.providers or provider.name in args.providers
        ]  # fmt: skip
    return jobs


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    on_gpu = torch.cuda.is_available()
    large = ["llama-3-8b", "qwen2-1.5b", "smollm2-135m", "qwen2-72b"]
    usual = large if on_gpu else ["tiny"]
    parser.add_argument("--cases", nargs="+", choices=CASES)
    parser.add_argument("--models", nargs="+", choices=NAMES, default=usual)
    parser.add_argument("--providers", nargs="+", choices=PROVIDER_NAMES)
    parser.add_argument("--rows", type=int, help="rows of a batch; 4, of the 72B shape 2")
    parser.add_argument(
        "--length", type=int, default=2048 if on_gpu else 32, help="tokens of a row"
    )
    parser.add_argument("--steps", type=int, default=8, help=f"to time, after {WARM_UP}")
    parser.add_argument("--limit", type=float, default=120, help="seconds a provider may take")
    parser.add_argument("--budget", type=float, help="seconds after which no provider is begun")
    parser.add_argument(
        "--fp32-absmax", action="store_true", help="NF4 without double quantisation"
    )
    parser.add_argument("--keep", action="store_true", help="keep earlier rows of other cases")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    rate = matmul_rate() if torch.cuda.is_available() else None
    if rate is not None:
        torch.cuda.empty_cache()
    jobs = chosen_jobs(args)
    earlier = RESULTS / device_name() / "train_step.json"
    rows = kept_rows(earlier, {(j.model, j.case) for j in jobs}) if args.keep else []
    absent, start = [], time.perf_counter()
    for job in jobs:
        late = args.budget is not None and time.perf_counter() - start >= args.budget
        found = "no time left" if late else run_apart(job)
        if isinstance(found, str):
            absent.append({k: getattr(job, k) for k in ("case", "model", "provider")})
            absent[-1]["reason"] = found
            print(
                f"{job.case:10} {job.model:11} {job.provider:32} not measured: {found}", flush=True
            )
        else:
            rows = compared([*rows, row_of(job, CASES[job.case], found, rate)])
            print_row(rows[-1])
        path = write_results("train_step", rows, PEERS, flops_per_s=rate, absent=absent)
    print_summary(rows)
    print(f"written: {path}" if jobs else "nothing to measure")


if __name__ == "__main__":
    main()
