"""The work of ``tli-engine train``."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tli_engine.align.encode import encode
from tli_engine.align.space import PairSpace, fit_space
from tli_engine.cli._evaluate import report_alignment, tokens_of
from tli_engine.cli.console import progress, say, warn
from tli_engine.cli.signals import Stop, stop_on_signals
from tli_engine.config import RunConfig, to_yaml, with_absolute_paths
from tli_engine.data.splits import Split, read_run_pairs, tokenize_splits
from tli_engine.errors import UserError
from tli_engine.evaluate.plots import plot_training
from tli_engine.models.adapters import adapter_tensors, add_lora
from tli_engine.models.device import choose_device, choose_dtype
from tli_engine.models.early import EarlyModel, load_early
from tli_engine.models.files import ModelFiles, open_model
from tli_engine.models.peft_format import load_adapter, save_adapter
from tli_engine.train.card import model_card
from tli_engine.train.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from tli_engine.train.loop import StepMetrics, Trainer
from tli_engine.train.manifest import write_manifest
from tli_engine.train.metrics import MetricsLog, check_tensorboard, read_metrics
from tli_engine.train.provenance import provenance
from tli_engine.train.run_folder import check_free, create, default_folder, write_text

_RESULT = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/README.md")


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs, checked, before anything is written."""

    config: RunConfig
    files: ModelFiles
    splits: list[Split]
    model: EarlyModel
    space: PairSpace
    provenance: dict[str, Any]


def prepare(config: RunConfig) -> Prepared:
    """Read pairs and model, fit the loss space, put the adapters on."""
    if config.train.tensorboard:
        check_tensorboard()
    pairs = read_run_pairs(config.data)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    files = open_model(config.model)
    splits = tokenize_splits(pairs, files.tokenizer, config.words)
    model = load_early(
        files,
        config.align.layer,
        dtype=dtype,
        device=device,
        quantize=config.quantize,
        double_quant=config.double_quant,
        token_ids=tokens_of(splits),
    )
    record = provenance(pairs, files, model)
    space = _fit_space(model, splits[0], config)
    _adapt(model, config)
    trainable = sum(t.numel() for t in adapter_tensors(model).values())
    say(
        f"{config.model}: {model.depth} of {files.config.num_hidden_layers} blocks, "
        f"{trainable:,} trainable parameters, {len(splits[0].pairs)} pairs, on {device}"
    )
    return Prepared(config, files, splits, model, space, record)


def run_training(config: RunConfig, name: str, folder: Path | None, overwrite: bool) -> int:
    """Train, save the adapter, measure it; everything is checked before the folder is made."""
    folder = folder or default_folder(name)
    check_free(folder, overwrite)
    run = prepare(config)
    create(folder, overwrite)
    record = with_absolute_paths(config).model_copy(update={"provenance": run.provenance})
    write_text(folder / "config.yaml", to_yaml(record))
    return _train(run, folder, None)


def resume_training(config: RunConfig, folder: Path) -> int:
    """Go on from the newest whole checkpoint of a run, or from its beginning."""
    found = find_checkpoint(folder)
    for reason in found.skipped:
        warn(f"checkpoint skipped: {reason}")
    run = prepare(config)
    recorded = config.provenance or {}
    for key in ("base_sha256", "pairs"):
        if recorded.get(key) != run.provenance[key]:
            raise UserError(f"{folder}: cannot resume: {key} is not what the run began with")
    if found.path is None:
        say(f"{folder}: no checkpoint yet; training from the beginning")
    return _train(run, folder, found.path)


def _fit_space(model: EarlyModel, train: Split, config: RunConfig) -> PairSpace:
    """The loss space, fitted on the base model's vectors of the distinct training words."""
    sides = (
        encode(model, list(dict.fromkeys(words)), [config.align.layer], config.align.pooling)[0]
        for words in (train.source, train.target)
    )
    return fit_space(config.align.space, *sides)


def _adapt(model: EarlyModel, config: RunConfig) -> None:
    if config.lora.init is None:
        add_lora(model, config.lora, config.align.layer, config.seed)
        return
    loaded = load_adapter(model, Path(config.lora.init), config.lora.dropout)
    if loaded.above:
        warn(f"{config.lora.init}: {len(loaded.above)} adapters above the loss are left out")


def _train(run: Prepared, folder: Path, checkpoint: Path | None) -> int:
    warnings: list[str] = []

    def on_warning(line: str) -> None:
        warnings.append(line)
        warn(line)

    trainer = Trainer(
        run.model, run.config, run.splits[0], run.space, lambda step: None, on_warning
    )
    kept: list[dict[str, Any]] = []
    if checkpoint is not None:
        load_checkpoint(checkpoint, trainer)
        kept = [step for step in read_metrics(folder) if step["step"] <= trainer.step]
        say(f"resuming after step {trainer.step} of {trainer.total_steps}")
    warnings += trainer.replay(kept)
    start = time.perf_counter()
    with (
        MetricsLog(folder, kept, run.config.train.tensorboard) as metrics,
        stop_on_signals() as stop,
    ):
        _run_steps(trainer, metrics, folder, stop)
    if stop():
        path = save_checkpoint(folder, trainer, run.config.train.keep_checkpoints)
        say(f"stopped after step {trainer.step}; kept {path}")
        say(f"resume with: tli-engine train --resume --run {folder}")
        return stop.exit_status
    done = trainer.step - len(kept)
    say(f"trained {done} steps in {time.perf_counter() - start:.1f} s")
    _finish(run, folder, metrics.steps, warnings)
    return 0


def _run_steps(trainer: Trainer, metrics: MetricsLog, folder: Path, stop: Stop) -> None:
    train = trainer.config.train
    with progress("train", trainer.total_steps) as advance:
        advance(trainer.step, "")

        def on_step(step: StepMetrics) -> None:
            metrics.append(step.to_json())
            if step.step % train.checkpoint_steps == 0:
                save_checkpoint(folder, trainer, train.keep_checkpoints)
            advance(1, f"loss {step.loss:.4f}")

        trainer.on_step = on_step
        trainer.run(until=stop)


def _finish(run: Prepared, folder: Path, steps: list[dict[str, Any]], warnings: list[str]) -> None:
    card = model_card(run.config, run.files, warnings)
    save_adapter(run.model, folder / "adapter", run.config.lora, run.files.hub_id, card)
    plot_training(steps, folder / "training.png")
    write_manifest(folder, ("config.yaml", "metrics.jsonl", *_RESULT))
    report_alignment(run.model, run.config, run.splits, folder, warnings)
