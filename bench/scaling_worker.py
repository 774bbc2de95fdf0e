"""One rank of the bench of several GPUs: builds a model, runs steps, and the first one reports.

``torchrun … -m bench.scaling_worker JOB FILE``; JOB is JSON, FILE is where the report goes.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from bench.models import Subject
from bench.train_cases import random_batches, train_subject
from bench.train_engine import InTurns, load_for_training, sft_config
from bench.train_worker import WARM_UP, Report
from tli_engine.config import RunConfig
from tli_engine.data.examples import Example
from tli_engine.distributed.launch import joined
from tli_engine.distributed.world import World
from tli_engine.models.causal import CausalModel, load_causal
from tli_engine.train.sft_distribute import loads_on_cpu, shard_base, shard_weights
from tli_engine.train.sft_prepare import fuse_for_texts
from tli_engine.train.sft_step import SftStep

# seconds that a rank may wait for another: weights are drawn at their own pace
_TIMEOUT = 300


@dataclass(frozen=True)
class Job:
    """What is measured on how many GPUs.

    Attributes:
        case: Of ``CASES`` in :mod:`bench.bench_scaling`.
        model: A shape.
        method: Adapters on every block over NF4, or every weight.
        weights: How the frozen ones lie on the GPUs.
        gpus: Ranks.
        rows: Of a GPU in a step.
        length: Tokens of a row.
        steps: To time.
        cuda_graph: As ``train.cuda_graph``.
    """

    case: str
    model: str
    method: Literal["lora", "full"]
    weights: Literal["replicated", "sharded"]
    gpus: int
    rows: int
    length: int
    steps: int
    cuda_graph: Literal["auto", "true", "false"] = "auto"


def config_of(job: Job, subject: Subject, device: torch.device) -> RunConfig:
    """The run, whose batch is that of all ranks."""
    sections = {
        "sft": {"context": job.length, "activations": "auto"},
        "train": {"batch_size": job.rows, "accumulate": job.gpus, "cuda_graph": job.cuda_graph},
    }
    config = sft_config(subject, job.method, "all", **sections)
    shared = config.distributed.model_copy(update={"weights": job.weights})
    named = str(subject.dtype).removeprefix("torch.")
    return config.model_copy(update={"distributed": shared, "device": str(device), "dtype": named})


def build(
    job: Job, world: World, device: torch.device
) -> tuple[CausalModel, dict[str, nn.Parameter], RunConfig]:
    """The model as ``tli-engine train`` spreads it over the ranks, and what is trained."""
    nf4 = job.method == "lora"
    subject = train_subject(job.model, device, nf4=nf4, double_quant=nf4)
    config = config_of(job, subject, device)
    if loads_on_cpu(config, world):
        model = load_causal(subject.files, dtype=subject.dtype, device=torch.device("cpu"))
        model.train_all(own=False)
        say = print if world.is_first else lambda line: None
        fuse_for_texts(model, config, say, device)
        return model, shard_weights(model, config, world, say), config
    model, tensors = load_for_training(subject, config)
    if job.weights == "sharded":
        shard_base(model, world)
    return model, tensors, config


def measure(job: Job, world: World, device: torch.device) -> Report:
    """Run and time steps; every rank does, and all get the slowest's times and the fullest's peak."""
    start = time.perf_counter()
    model, tensors, config = build(job, world, device)
    built = time.perf_counter() - start
    batches = random_batches(model.early.config, job.rows * job.gpus, job.length)
    examples = [Example(tuple(row), 1) for ids in batches for row in ids.tolist()]
    rows = len(batches[0])
    order = InTurns([[[i * rows + j] for j in range(rows)] for i in range(len(batches))])
    step = SftStep(model, tensors, examples, order, config, None, world=world)  # type: ignore[arg-type]
    model.train()
    memory: dict[str, Any] = {}
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        memory["held_mib"] = torch.cuda.memory_allocated() / 2**20
    seconds, losses = timed(lambda number: step.run(number).loss, WARM_UP + job.steps, world)
    step.pause()
    if device.type == "cuda":
        memory["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        memory["reserved_mib"] = torch.cuda.max_memory_reserved() / 2**20
    memory = dict(zip(memory, world.largest(list(memory.values())), strict=True)) if memory else {}
    trained = model.trained_parameters
    return Report(seconds[WARM_UP:], losses, trained, built, seconds[0], **memory)


def timed(run: Callable[[int], float], steps: int, world: World) -> tuple[list[float], list[float]]:
    """Seconds from the figures of one step to those of the next, the slowest rank's, and losses."""
    seconds, losses = [], []
    begun = time.perf_counter()
    for number in range(steps):
        losses.append(run(number))
        now = time.perf_counter()
        seconds += world.largest([now - begun])
        begun = now
    return seconds, losses


def main() -> None:
    job, path = Job(**json.loads(sys.argv[1])), Path(sys.argv[2])
    with joined("auto", _TIMEOUT) as (world, device):
        where = "cuda" if device == "auto" and torch.cuda.is_available() else device
        found = measure(job, world, torch.device(where.replace("auto", "cpu")))
        if world.is_first:
            path.write_text(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
