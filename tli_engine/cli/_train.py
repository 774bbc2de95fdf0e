"""The work of ``tli-engine train``."""

import shlex
import time
from pathlib import Path
from typing import Any

from tli_engine.cli._job import Job, RunTrainer, StepFigures
from tli_engine.cli.console import progress, say, warn
from tli_engine.cli.signals import Stop, stop_on_signals
from tli_engine.config import RunConfig, to_yaml, with_absolute_paths
from tli_engine.errors import UserError
from tli_engine.train.checkpoint import Found, find_checkpoint, load_checkpoint, save_checkpoint
from tli_engine.train.manifest import problems
from tli_engine.train.metrics import MetricsLog, read_metrics
from tli_engine.train.run_folder import check_free, create, default_folder, write_text

# what a run that goes on must still be made from
_RECORDED = ("base_sha256", "pairs", "texts", "lora_init_sha256")


def run_training(config: RunConfig, name: str, folder: Path | None, overwrite: bool) -> int:
    """Train, save the result, measure it; everything is checked before the folder is made."""
    folder = folder or default_folder(name)
    check_free(folder, overwrite)
    job = _prepare(config)
    _introduce(job)
    create(folder, overwrite)
    record = with_absolute_paths(job.run.config).model_copy(
        update={"provenance": job.run.provenance}
    )
    write_text(folder / "config.yaml", to_yaml(record))
    return _train(job, folder, Found(None, []))


def resume_training(config: RunConfig, folder: Path) -> int:
    """Go on from the newest whole checkpoint of a run, or from its beginning."""
    if not problems(folder):
        raise UserError(f"{folder}: has finished; measure it with tli-engine evaluate {folder}")
    found = find_checkpoint(folder)
    for reason in found.skipped:
        warn(f"checkpoint skipped: {reason}")
    job = _prepare(config)
    recorded = config.provenance or {}
    for key in _RECORDED:
        if recorded.get(key) != job.run.provenance.get(key):
            raise UserError(f"{folder}: cannot resume: {key} is not what the run began with")
    if recorded.get("versions") != job.run.provenance["versions"]:
        warn("versions are not those the run began with; results may differ in the last bits")
    _introduce(job)
    if found.path is None:
        say(f"{folder}: no whole checkpoint; training from the beginning")
    return _train(job, folder, found)


def _prepare(config: RunConfig) -> Job:
    # either takes libraries that the other does without
    if config.objective == "align":
        from tli_engine.cli._train_align import AlignJob

        return AlignJob.prepare(config)
    from tli_engine.cli._train_sft import SftJob

    return SftJob.prepare(config)


def _introduce(job: Job) -> None:
    say(job.introduction())
    for line in job.run.warnings:
        warn(line)


def _train(job: Job, folder: Path, checkpoint: Found) -> int:
    warnings = list(job.run.warnings)

    def on_warning(line: str) -> None:
        warnings.append(line)
        warn(line)

    trainer = job.make_trainer(folder, on_warning)
    kept: list[dict[str, Any]] = []
    if checkpoint.path is not None:
        load_checkpoint(checkpoint.path, trainer)
        kept = [step for step in read_metrics(folder) if step["step"] <= trainer.step]
        say(f"resuming after step {trainer.step} of {trainer.total_steps}")
    warnings += trainer.replay(kept)
    start, first = time.perf_counter(), trainer.step
    train = job.run.config.train
    with MetricsLog(folder, kept, train.tensorboard) as metrics, stop_on_signals() as stop:
        _run_steps(trainer, metrics, folder, stop)
        metrics.sync()
        # the last step too: what follows may fail, and the steps are what took the time
        path = save_checkpoint(folder, trainer, train.keep_checkpoints)
    if stop():
        say(f"stopped after step {trainer.step}; kept {path}")
        say(f"resume with: tli-engine train --resume --run {shlex.quote(str(folder))}")
        return stop.exit_status
    say(f"trained {trainer.step - first} steps in {time.perf_counter() - start:.1f} s")
    job.finish(trainer, folder, metrics.steps, warnings)
    return 0


def _run_steps(trainer: RunTrainer, metrics: MetricsLog, folder: Path, stop: Stop) -> None:
    train = trainer.config.train
    with progress("train", trainer.total_steps) as advance:
        advance(trainer.step, "")

        def on_step(step: StepFigures) -> None:
            metrics.append(step.to_json())
            if step.step % train.checkpoint_steps == 0:
                metrics.sync()
                save_checkpoint(folder, trainer, train.keep_checkpoints)
            advance(1, f"loss {step.loss:.4f}")

        trainer.on_step = on_step
        trainer.run(until=stop)
