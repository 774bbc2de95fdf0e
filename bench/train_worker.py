"""Measures one provider of the bench of fine-tuning steps, in a process of its own.

A process each: Liger and Unsloth patch transformers for good, a crash or a time limit ends one
provider alone, and all of its memory is free for the next. ``python -m bench.train_worker JOB FILE``
is how :func:`run_apart` runs it; JOB is JSON, FILE is where the report goes.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness import gpu_busy
from bench.models import Subject
from bench.train_cases import (
    CASES,
    Absent,
    Case,
    Provider,
    Step,
    providers_of,
    random_batches,
    train_subject,
)
from tli_engine.models.device import choose_device

# steps that are run before any is timed: kernels are built, the allocator fills up
WARM_UP = 3
_FEWEST = 3
_TRACED = 2
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "UNSLOTH_DISABLE_STATISTICS": "1",
}
_WORKER = ("-m", "bench.train_worker")
# it wants to be imported before transformers, which it patches; why it cannot be is said later
_UNSLOTH_WORKER = (
    "-c",
    "from contextlib import suppress\n"
    "with suppress(Exception): import unsloth\n"
    "from bench.train_worker import main; main()",
)
_LINES = 15


@dataclass(frozen=True)
class Job:
    """What one process measures.

    Attributes:
        model: Name of the model.
        case: Name of the case.
        provider: Name of the provider.
        rows: Of a batch.
        length: Tokens of a row.
        steps: To time.
        limit_s: Seconds after which the process is ended; the last third is left for the trace.
        double_quant: Whether the absmax of NF4 weights is in 8 bits, the peers' usual.
    """

    model: str
    case: str
    provider: str
    rows: int
    length: int
    steps: int
    limit_s: float
    double_quant: bool = True


@dataclass(frozen=True)
class Report:
    """What was measured; seconds are of each timed step, losses of the first steps.

    Attributes:
        seconds: From one step to the next, by a clock on the wall.
        losses: Of every step from the first.
        trained: Parameters that are trained.
        build_s: Seconds to make the model.
        first_s: Seconds of the first step.
        held_mib: GPU memory before the first step.
        peak_mib: The most allocated, and with what the allocator kept besides.
        retries: Times the allocator had to give up what it kept, in order to go on.
        gpu_ms: Time in which the GPU is busy in a step, and kernels in it.
    """

    seconds: list[float]
    losses: list[float]
    trained: int
    build_s: float
    first_s: float
    held_mib: float | None = None
    peak_mib: float | None = None
    reserved_mib: float | None = None
    retries: int | None = None
    gpu_ms: float | None = None
    kernels: int | None = None


def builder(provider: Provider) -> Callable[[Subject, Case, Provider, list[Tensor]], Step]:
    """What makes a provider's step. Imported late: one provider's patches must not reach another's."""
    if provider.kind == "engine":
        from bench.train_engine import engine_train_step

        return engine_train_step
    if provider.kind == "unsloth":
        from bench.train_unsloth import unsloth_step

        return unsloth_step
    from bench.train_peers import peer_step

    return peer_step


def measure(build: Callable[[], Step], steps: int, limit_s: float) -> Report:
    """Build a step, run it some times, then time it and trace it."""
    on_gpu = torch.cuda.is_available()
    start = time.perf_counter()
    step = build()
    built = time.perf_counter()
    memory: dict[str, Any] = {}
    if on_gpu:
        torch.cuda.synchronize()
        # what building took for a moment is no peak
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        memory["held_mib"] = torch.cuda.memory_allocated() / 2**20
    seconds, losses = timed(step, steps, start + limit_s * 2 / 3)
    if on_gpu:
        torch.cuda.synchronize()
        memory["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        memory["reserved_mib"] = torch.cuda.max_memory_reserved() / 2**20
        memory["retries"] = torch.cuda.memory_stats().get("num_alloc_retries", 0)
        memory["gpu_ms"], memory["kernels"] = gpu_busy(step.call, _TRACED)
    return Report(
        seconds[WARM_UP:], losses, step.trained, built - start, seconds[0], **memory
    )  # fmt: skip


def timed(step: Step, steps: int, latest: float) -> tuple[list[float], list[float]]:
    """Run steps one after another; seconds from one to the next, the first ones' too, and losses.

    A loss is read when the next step is launched: no provider's GPU waits for the host to read it.
    """
    seconds: list[float] = []
    losses: list[float] = []
    before: float | Tensor | None = None
    begun = time.perf_counter()
    for number in range(WARM_UP + steps):
        if begun > latest and number >= WARM_UP + _FEWEST:
            break
        loss = step.call()
        if before is not None:
            losses.append(float(before))
        before, now = loss, time.perf_counter()
        seconds.append(now - begun)
        begun = now
    assert before is not None
    return seconds, [*losses, float(before)]


def run_job(job: Job) -> Report:
    """Measure in this process.

    Raises:
        Absent: The provider cannot be measured here.
    """
    case, device = CASES[job.case], choose_device("auto")
    provider = next(p for p in providers_of(case, job.model) if p.name == job.provider)
    if provider.memory_gib:
        if device.type != "cuda":
            raise Absent("its memory can be limited on a GPU alone")
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(provider.memory_gib * 2**30 / total)

    def build() -> Step:
        make = builder(provider)
        nf4 = case.method == "lora" and not provider.dense
        options = {"nf4": nf4, "double_quant": job.double_quant, "fp32": provider.fp32}
        subject = train_subject(job.model, device, **options)
        batches = random_batches(subject.files.config, job.rows, job.length)
        return make(subject, case, provider, batches)

    return measure(build, job.steps, job.limit_s)


def worker_of(job: Job) -> tuple[str, ...]:
    """What Python is to run for a job."""
    return _UNSLOTH_WORKER if job.provider.startswith("unsloth") else _WORKER


def run_apart(job: Job, command: tuple[str, ...] | None = None) -> Report | str:
    """Measure in a process of its own; a line that says why not, where it cannot be."""
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder) / "report.json", Path(folder) / "log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, *(command or worker_of(job)), json.dumps(asdict(job)), str(path)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_ENVIRONMENT | dict(os.environ),
            )
            try:
                code = process.wait(job.limit_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                return f"took over {job.limit_s:.0f} s"
        if path.is_file():
            found = json.loads(path.read_text())
            if "absent" not in found:
                return Report(**found)
            reason = str(found["absent"])
        else:
            reason = f"exit status {code}"
        lines = deque(log.read_text(errors="replace").splitlines(), _LINES)
        print("\n".join(f"    | {line[:160]}" for line in lines), flush=True)
        return reason


def main() -> None:
    job, path = Job(**json.loads(sys.argv[1])), Path(sys.argv[2])
    try:
        report = asdict(run_job(job))
    except Absent as reason:
        report = {"absent": str(reason)}
    except torch.OutOfMemoryError as error:
        report = {"absent": f"out of memory: {str(error).partition(' GPU ')[0]}"}
    except BaseException as error:
        lines = str(error).strip().splitlines() or [""]
        path.write_text(json.dumps({"absent": f"{type(error).__name__}: {lines[0][:200]}"}))
        raise
    path.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
