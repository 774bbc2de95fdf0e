"""The work of ``tli-engine train``."""

import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tli_engine.cli._job import Job, RunTrainer, StepFigures
from tli_engine.cli._resume_command import how_to_resume
from tli_engine.cli.console import progress, say, warn
from tli_engine.cli.signals import AgreedStop, stop_on_signals
from tli_engine.config import RunConfig, to_yaml, with_absolute_paths
from tli_engine.distributed.launch import joined
from tli_engine.distributed.world import World
from tli_engine.errors import TrainingError, UserError
from tli_engine.models.files import open_model
from tli_engine.train.checkpoint import (
    Found,
    checkpoints,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from tli_engine.train.checks import idle
from tli_engine.train.manifest import problems
from tli_engine.train.metrics import MetricsLog, read_metrics
from tli_engine.train.run_folder import check_free, create, default_folder, write_text

# what a run that goes on must still be made from
_RECORDED = ("base_sha256", "pairs", "texts", "lora_init_sha256")
# of articles as the model reads them; earlier runs did not record it
_TOKENS = "tokens_sha256"


def run_training(config: RunConfig, name: str, folder: Path | None, overwrite: bool) -> int:
    """Train, save the result, measure it; everything is checked before the folder is made."""
    with joined(config.device, config.distributed.timeout) as (world, device):
        _check_same_start(world, folder, resume=False)
        chosen = Path(world.share(str(folder or default_folder(name))))
        _of_first(world, lambda: check_free(chosen, overwrite))
        job = _prepare(config, world, device)
        _introduce(job)
        _of_first(world, lambda: _begin(job, chosen, overwrite))
        world.together(lambda: _check_seen(chosen))
        return _train(job, chosen, Found(None, []))


def resume_training(config: RunConfig, folder: Path) -> int:
    """Go on from the newest whole checkpoint of a run, or from its beginning."""
    with joined(config.device, config.distributed.timeout) as (world, device):
        _check_same_start(world, folder, resume=True)
        found = _find(world, folder)
        if world.size == 1:
            config = _whole(config)
        job = _prepare(config, world, device)
        recorded = config.provenance or {}
        world.together(lambda: _check_recorded(recorded, job.run.provenance, folder))
        if recorded.get("versions") != job.run.provenance["versions"]:
            warn("versions are not those the run began with; results may differ in the last bits")
        _introduce(job)
        if found.path is None:
            say(f"{folder}: no whole checkpoint; training from the beginning")
        return _train(job, folder, found)


def _whole(config: RunConfig) -> RunConfig:
    """A run as one process goes on with it, whatever several had shares of."""
    shared = config.distributed
    if shared.weights == "replicated" and not shared.offload:
        return config
    say("one process: it holds what several had shares of; distributed counts for these alone")
    whole = shared.model_copy(update={"weights": "replicated", "offload": False})
    return config.model_copy(update={"distributed": whole})


def _check_same_start(world: World, folder: Path | None, *, resume: bool) -> None:
    """Refuse a machine that was to begin another run, or to go on with one alone."""
    world.check_alike(
        "the run folder, or whether to resume,",
        f"{resume} {folder}",
        "give all machines the same folder, and --resume to all of them or to none",
    )


def _check_seen(folder: Path) -> None:
    """Refuse a folder of the first process that this one's machine does not have."""
    if not (folder / "config.yaml").is_file():
        raise UserError(
            f"{folder}: what the first process wrote there is not seen from {platform.node()}; choose a "
            f"run folder that all machines see"
        )


def _check_recorded(recorded: dict[str, Any], found: dict[str, Any], folder: Path) -> None:
    for key in _RECORDED:
        if recorded.get(key) != found.get(key):
            raise UserError(f"{folder}: cannot resume: {key} is not what the run began with")
    if _TOKENS in found and _TOKENS not in recorded:
        warn(f"{folder}: has no {_TOKENS}; whether the tokenizer is the run's is not known")
    elif recorded.get(_TOKENS) != found.get(_TOKENS):
        raise UserError(
            f"{folder}: cannot resume: {_TOKENS} is not what the run began with: the articles are the same, "
            f"the tokenizer or its chat template is another"
        )


def _of_first(world: World, work: Callable[[], None]) -> None:
    """What the first process does alone; where it may not, all end."""
    world.together(work if world.is_first else lambda: None)


def _begin(job: Job, folder: Path, overwrite: bool) -> None:
    create(folder, overwrite)
    record = with_absolute_paths(job.run.config).model_copy(
        update={"provenance": job.run.provenance}
    )
    write_text(folder / "config.yaml", to_yaml(record))


def _find(world: World, folder: Path) -> Found:
    """The checkpoint that the first process sees."""

    def look() -> Found:
        if not world.is_first:
            # it reads all of each file: no work for every process
            return Found(None, [])
        if not problems(folder):
            raise UserError(f"{folder}: has finished; measure it with tli-engine evaluate {folder}")
        return find_checkpoint(folder)

    found = world.together(look)
    for reason in found.skipped:
        warn(f"checkpoint skipped: {reason}")
    path = world.share(None if found.path is None else str(found.path))
    return Found(None if path is None else Path(path), found.skipped)


def _prepare(config: RunConfig, world: World, device: str) -> Job:
    config = config.model_copy(update={"device": device})
    # on each machine one process downloads and converts, the others find it done
    fetches = world.size > 1 and os.environ.get("LOCAL_RANK") == "0"
    world.together(lambda: open_model(config.model) if fetches else None)
    # either takes libraries that the other does without
    if config.objective == "align":
        from tli_engine.cli._train_align import AlignJob as Objective
    else:
        from tli_engine.cli._train_sft import SftJob as Objective  # type: ignore[assignment]
    job: Job = world.together(lambda: Objective.prepare(config, world))
    world.check_alike(
        "the configuration",
        config.model_dump_json(exclude={"device"}),
        "give all machines the same file, recipe and --set",
    )
    world.check_alike(
        "what the run is made from",
        json.dumps(job.run.provenance, sort_keys=True),
        "all machines must see the same files and the same versions",
    )
    return job


def _introduce(job: Job) -> None:
    say(job.introduction())
    for line in job.run.warnings:
        warn(line)


def _train(job: Job, folder: Path, checkpoint: Found) -> int:
    warnings = list(job.run.warnings)

    def on_warning(line: str) -> None:
        warnings.append(line)
        warn(line)

    world, trainer = job.world, job.make_trainer(folder, on_warning)
    for line in idle(job.run.config, trainer.rows_of_step, world.size):
        # of how it runs, not of what comes of it: no report has it
        warn(line)
    kept: list[dict[str, Any]] = []
    if (path := checkpoint.path) is not None:
        load_checkpoint(path, trainer, world)
        kept = [step for step in read_metrics(folder) if step["step"] <= trainer.reported]
        say(f"resuming after step {trainer.step} of {trainer.total_steps}")
    warnings += trainer.replay(kept)
    start, first = time.perf_counter(), trainer.step
    train = job.run.config.train
    with ExitStack() as stack:
        metrics = None
        if world.is_first:
            metrics = stack.enter_context(MetricsLog(folder, kept, train.tensorboard))
        stop = stack.enter_context(stop_on_signals())
        until = AgreedStop(stop, world, job.steps_between_words if world.size > 1 else 1)
        try:
            _run_steps(trainer, metrics, folder, world, until)
        except TrainingError as e:
            raise type(e)(f"{e}; {_last_checkpoint(folder, world)}") from e
        # the last step too: what follows may fail, and the steps are what took the time
        last = _keep(trainer, metrics, folder, world)
    if until.settle():
        say(f"stopped after step {trainer.step}; kept {last}")
        say(how_to_resume(folder, world.size))
        return stop.exit_status
    say(f"trained {trainer.step - first} steps in {time.perf_counter() - start:.1f} s")
    job.finish(trainer, folder, [] if metrics is None else metrics.steps, warnings)
    return 0


def _last_checkpoint(folder: Path, world: World) -> str:
    """What a run that failed can go on from."""
    if world.size > 1:
        # all may fail at once, and would be ended as they read all of its files
        last = checkpoints(folder)[:1]
        return f"the last checkpoint is {last[0]}" if last else "there is no checkpoint yet"
    path = find_checkpoint(folder).path
    return "there is no checkpoint yet" if path is None else f"{path} is whole"


def _keep(trainer: RunTrainer, metrics: MetricsLog | None, folder: Path, world: World) -> Path:
    """Write a checkpoint."""
    if metrics is not None:
        metrics.sync()
    return save_checkpoint(folder, trainer, trainer.config.train.keep_checkpoints, world)


def _run_steps(
    trainer: RunTrainer,
    metrics: MetricsLog | None,
    folder: Path,
    world: World,
    stop: Callable[[], bool],
) -> None:
    train = trainer.config.train
    with progress("train", trainer.total_steps) as advance:
        advance(trainer.step, "")

        def on_step(step: StepFigures) -> None:
            if metrics is not None:
                metrics.append(step.to_json())
            if step.step % train.checkpoint_steps == 0:
                _keep(trainer, metrics, folder, world)
            advance(1, f"loss {step.loss:.4f}")

        trainer.on_step = on_step
        trainer.run(until=stop)
