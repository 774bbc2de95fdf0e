"""Steps of fine-tuning on one GPU and on several of one machine.

``lora``: adapters of rank 16 on every projection of every block over NF4 weights that each GPU
holds; ``full``: every weight, in shares from two GPUs on (FSDP2, fp32 master and AdamW states), of a
shape that one GPU holds too; ``full_8b``: the same of one that takes two; ``qlora_sharded``: adapters
over NF4 weights of which each GPU holds a share of the bytes. Each GPU has the same rows in a step
however many there are; ``ratio_to_baseline`` is the tokens a second against those of the fewest GPUs,
``efficiency`` in the notes that over the ratio of their numbers. Random tokens, all of them labels;
random weights. The results are written after every job; what there are too few GPUs for is said, and
noted as absent.

Without a GPU, processes on the CPU take their place, of a tiny shape.

python -m bench scaling [--cases ...] [--gpus N ...] [--model NAME] [--rows N] [--length N] [--steps N]
    [--limit S] [--cuda-graph {auto,true,false}]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from bench.harness import Row, device_name, quantiles_ms, write_results
from bench.scaling_worker import Job
from bench.train_cases import NAMES
from bench.train_worker import WARM_UP, Report


@dataclass(frozen=True)
class Scaling:
    """A case: what is trained, of which shape, on how many GPUs at the least."""

    model: str
    method: Literal["lora", "full"]
    weights: Literal["replicated", "sharded"] = "replicated"
    fewest: int = 1
    rows: int = 4


CASES = {
    "lora": Scaling("llama-3-8b", "lora"),
    "full": Scaling("qwen2-1.5b", "full"),
    "full_8b": Scaling("llama-3-8b", "full", fewest=2, rows=1),
    "qlora_sharded": Scaling("qwen2-72b", "lora", "sharded", fewest=2, rows=2),
}
# by ``--cuda-graph``, as ``bench train_step`` names them
PROVIDERS = {"auto": "tli-engine", "true": "tli-engine:graphs", "false": "tli-engine:launches"}
# how a provider's steps run, in tables
HOW = {"tli-engine": "", "tli-engine:graphs": ", from graphs", "tli-engine:launches": ", launched"}
# what a job that failed said last
_LINES = 12


def run_ranks(job: Job, limit_s: float) -> Report | str:
    """Measure on so many ranks of this machine; a line that says why not, where it cannot be."""
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder) / "report.json", Path(folder) / "log"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(job.gpus), "-m", "bench.scaling_worker"]
        command += [json.dumps(asdict(job)), str(path)]
        environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ)
        with log.open("w") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment
            )
            try:
                code = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                # torchrun ends its ranks as it is ended
                process.terminate()
                process.wait()
                return f"took over {limit_s:.0f} s"
        if path.is_file():
            return Report(**json.loads(path.read_text()))
        lines = deque(log.read_text(errors="replace").splitlines(), _LINES)
        print("\n".join(f"    | {line[:160]}" for line in lines), flush=True)
        return f"exit status {code}"


def row_of(job: Job, report: Report) -> Row:
    """A row of results, not compared yet."""
    median, tokens = statistics.median(report.seconds), job.gpus * job.rows * job.length
    notes: dict[str, Any] = {
        "tokens_per_s": round(tokens / median, 1),
        "steps": len(report.seconds),
        "losses": [round(loss, 5) for loss in report.losses],
        "trained": report.trained,
        "weights": job.weights,
        "build_s": round(report.build_s, 1),
        "first_step_s": round(report.first_s, 2),
        "held_mib": report.held_mib,
        "reserved_mib": report.reserved_mib,
    }
    shape = {"gpus": job.gpus, "rows": job.rows, "length": job.length}
    return Row(
        job.case, shape, job.model, PROVIDERS[job.cuda_graph], *quantiles_ms(report.seconds), 1.0,
        peak_mib=report.peak_mib, notes=notes,
    )  # fmt: skip


def compared(rows: Sequence[Row]) -> list[Row]:
    """The rows with their tokens a second against those of the fewest GPUs of their case."""
    found = []
    for row in rows:
        alike = [r for r in rows if (r.case, r.model) == (row.case, row.model)]
        first = min(alike, key=lambda r: r.shape["gpus"])
        ratio = row.notes["tokens_per_s"] / first.notes["tokens_per_s"]
        efficiency = ratio / (row.shape["gpus"] / first.shape["gpus"])
        notes = {**row.notes, "efficiency": round(efficiency, 3)}
        found.append(replace(row, ratio_to_baseline=ratio, notes=notes))
    return found


def print_row(row: Row) -> None:
    """One line for a person."""
    peak = "" if row.peak_mib is None else f"{row.peak_mib / 1024:6.2f} GiB a GPU"
    print(
        f"{row.case:14} {row.model:11} {row.shape['gpus']} GPUs {row.notes['tokens_per_s']:9.0f} "
        f"tokens/s {row.ms:8.1f} ms [{row.ms_p20:.1f}, {row.ms_p80:.1f}] "
        f"{row.ratio_to_baseline:5.2f} x, efficiency {row.notes['efficiency']:.2f} {peak}".rstrip(),
        flush=True,
    )


def chosen_jobs(args: argparse.Namespace) -> list[Job]:
    """Every job, the fewest GPUs first."""
    jobs = []
    for name in args.cases or CASES:
        case = CASES[name]
        jobs += [
            Job(
                name, args.model or case.model, case.method, case.weights, gpus,
                args.rows or case.rows, args.length, args.steps, args.cuda_graph,
            )
            for gpus in sorted(args.gpus)
            if gpus >= case.fewest
        ]  # fmt: skip
    return jobs


def missing(job: Job) -> str | None:
    """Why a job cannot be run here, if it cannot."""
    if torch.cuda.is_available():
        here = torch.cuda.device_count()
        return None if job.gpus <= here else f"needs {job.gpus} GPUs, {here} here"
    return None if job.model == "tiny" else "needs GPUs; the CPU runs --model tiny"


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--cases", nargs="+", choices=CASES)
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2], help="how many, in turns")
    parser.add_argument("--model", choices=NAMES, default=None if on_gpu else "tiny")
    parser.add_argument("--rows", type=int, help="of each GPU in a step")
    parser.add_argument(
        "--length", type=int, default=2048 if on_gpu else 32, help="tokens of a row"
    )
    parser.add_argument("--steps", type=int, default=8, help=f"to time, after {WARM_UP}")
    parser.add_argument("--limit", type=float, default=300, help="seconds a job may take")
    parser.add_argument(
        "--cuda-graph",
        choices=PROVIDERS,
        default="auto",
        help="as train.cuda_graph",
    )
    return parser.parse_args(given)


def main() -> None:
    args = arguments()
    rows: list[Row] = []
    absent: list[dict[str, Any]] = []
    for job in chosen_jobs(args):
        reason = missing(job)
        found = reason if reason is not None else run_ranks(job, args.limit)
        if isinstance(found, str):
            absent.append({"case": job.case, "model": job.model, "gpus": job.gpus})
            absent[-1]["reason"] = found
            print(f"{job.case:14} {job.model:11} {job.gpus} GPUs not measured: {found}", flush=True)
        else:
            rows = compared([*rows, row_of(job, found)])
            print_row(rows[-1])
        path = write_results("scaling", rows, [], absent=absent)
        print(f"written: {path} ({device_name()})")


if __name__ == "__main__":
    main()
