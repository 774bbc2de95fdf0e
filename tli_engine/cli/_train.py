"""The work of ``tli-engine train``."""

import shlex
import time
from pathlib import Path
from typing import Any

from tli_engine.cli._evaluate import report_alignment
from tli_engine.cli.console import progress, say, warn
from tli_engine.cli.signals import Stop, stop_on_signals
from tli_engine.config import RunConfig, to_yaml, with_absolute_paths
from tli_engine.errors import TrainingError, UserError
from tli_engine.evaluate.plots import plot_training
from tli_engine.models.adapters import adapter_tensors
from tli_engine.models.peft_format import save_adapter
from tli_engine.train.card import model_card
from tli_engine.train.checkpoint import Found, find_checkpoint, load_checkpoint, save_checkpoint
from tli_engine.train.loop import StepMetrics, Trainer
from tli_engine.train.manifest import problems, write_manifest
from tli_engine.train.metrics import MetricsLog, read_metrics
from tli_engine.train.prepare import Prepared, prepare
from tli_engine.train.run_folder import check_free, create, default_folder, write_text

_RESULT = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/README.md")


def run_training(config: RunConfig, name: str, folder: Path | None, overwrite: bool) -> int:
    """Train, save the adapter, measure it; everything is checked before the folder is made."""
    folder = folder or default_folder(name)
    check_free(folder, overwrite)
    run = prepare(config, say)
    _introduce(run)
    create(folder, overwrite)
    record = with_absolute_paths(run.config).model_copy(update={"provenance": run.provenance})
    write_text(folder / "config.yaml", to_yaml(record))
    return _train(run, folder, Found(None, []))


def resume_training(config: RunConfig, folder: Path) -> int:
    """Go on from the newest whole checkpoint of a run, or from its beginning."""
    if not problems(folder):
        raise UserError(f"{folder}: has finished; measure it with tli-engine evaluate {folder}")
    found = find_checkpoint(folder)
    for reason in found.skipped:
        warn(f"checkpoint skipped: {reason}")
    run = prepare(config, say)
    recorded = config.provenance or {}
    for key in ("base_sha256", "pairs", "lora_init_sha256"):
        if recorded.get(key) != run.provenance.get(key):
            raise UserError(f"{folder}: cannot resume: {key} is not what the run began with")
    if recorded.get("versions") != run.provenance["versions"]:
        warn("versions are not those the run began with; results may differ in the last bits")
    _introduce(run)
    if found.path is None:
        say(f"{folder}: no whole checkpoint; training from the beginning")
    return _train(run, folder, found)


def _introduce(run: Prepared) -> None:
    trainable = sum(t.numel() for t in adapter_tensors(run.model).values())
    say(
        f"{run.config.model}: {run.model.depth} of {run.files.config.num_hidden_layers} blocks, "
        f"{trainable:,} trainable parameters, {len(run.splits[0].pairs)} pairs, on "
        f"{run.config.device}"
    )
    for line in run.warnings:
        warn(line)


def _train(run: Prepared, folder: Path, checkpoint: Found) -> int:
    warnings = list(run.warnings)

    def on_warning(line: str) -> None:
        warnings.append(line)
        warn(line)

    trainer = Trainer(run.model, run.config, run.splits[0], run.space, on_warning=on_warning)
    kept: list[dict[str, Any]] = []
    if checkpoint.path is not None:
        load_checkpoint(checkpoint.path, trainer)
        kept = [step for step in read_metrics(folder) if step["step"] <= trainer.step]
        say(f"resuming after step {trainer.step} of {trainer.total_steps}")
    warnings += trainer.replay(kept)
    start, first = time.perf_counter(), trainer.step
    tensorboard = run.config.train.tensorboard
    with MetricsLog(folder, kept, tensorboard) as metrics, stop_on_signals() as stop:
        _run_steps(trainer, metrics, folder, stop)
        metrics.sync()
        # the last step too: what follows may fail, and the steps are what took the time
        path = save_checkpoint(folder, trainer, run.config.train.keep_checkpoints)
    if stop():
        say(f"stopped after step {trainer.step}; kept {path}")
        say(f"resume with: tli-engine train --resume --run {shlex.quote(str(folder))}")
        return stop.exit_status
    say(f"trained {trainer.step - first} steps in {time.perf_counter() - start:.1f} s")
    _finish(run, folder, metrics.steps, warnings)
    return 0


def _run_steps(trainer: Trainer, metrics: MetricsLog, folder: Path, stop: Stop) -> None:
    train = trainer.config.train
    with progress("train", trainer.total_steps) as advance:
        advance(trainer.step, "")

        def on_step(step: StepMetrics) -> None:
            metrics.append(step.to_json())
            if step.step % train.checkpoint_steps == 0:
                metrics.sync()
                save_checkpoint(folder, trainer, train.keep_checkpoints)
            advance(1, f"loss {step.loss:.4f}")

        trainer.on_step = on_step
        trainer.run(until=stop)


def _finish(run: Prepared, folder: Path, steps: list[dict[str, Any]], warnings: list[str]) -> None:
    if run.model.base_digest() != run.provenance["base_sha256"]:
        raise TrainingError("the frozen weights are not what they were before training")
    card = model_card(run.model, run.config, run.files, unseen=len(run.splits) > 1, notes=warnings)
    save_adapter(run.model, folder / "adapter", run.config.lora, run.files.hub_id, card)
    plot_training(steps, folder / "training.png")
    write_manifest(folder, ("config.yaml", "metrics.jsonl", *_RESULT))
    report_alignment(run.model, run.config, run.splits, folder, warnings)
