"""The work of ``tli-engine train``."""

import json
import time
from pathlib import Path
from typing import Any, TextIO

from tli_engine.align.encode import encode
from tli_engine.align.space import PairSpace, fit_space
from tli_engine.cli._evaluate import report_alignment
from tli_engine.cli.console import progress, say, warn
from tli_engine.config import RunConfig, to_yaml
from tli_engine.data.splits import Split, read_run_pairs, tokenize_splits
from tli_engine.evaluate.plots import plot_training
from tli_engine.models.adapters import adapter_tensors, add_lora
from tli_engine.models.device import choose_device, choose_dtype
from tli_engine.models.early import EarlyModel, load_early
from tli_engine.models.files import open_model
from tli_engine.models.peft_format import load_adapter, save_adapter
from tli_engine.train.card import model_card
from tli_engine.train.loop import StepMetrics, Trainer
from tli_engine.train.provenance import provenance
from tli_engine.train.run_folder import check_free, create, default_folder, write_text


def run_training(config: RunConfig, name: str, folder: Path | None, overwrite: bool) -> None:
    """Train, save the adapter, measure it; everything is checked before the folder is made."""
    folder = folder or default_folder(name)
    check_free(folder, overwrite)
    pairs = read_run_pairs(config.data)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    files = open_model(config.model)
    splits = tokenize_splits(pairs, files.tokenizer, config.words)
    model = load_early(files, config.align.layer, dtype=dtype, device=device)
    space = _fit_space(model, splits[0], config)
    _adapt(model, config)
    trainable = sum(t.numel() for t in adapter_tensors(model).values())
    say(
        f"{config.model}: {model.depth} of {files.config.num_hidden_layers} blocks, "
        f"{trainable:,} trainable parameters, {len(splits[0].pairs)} pairs, on {device}"
    )
    create(folder, overwrite)
    record = config.model_copy(update={"provenance": provenance(pairs, files, model)})
    write_text(folder / "config.yaml", to_yaml(record))
    steps, warnings, seconds = _train(model, config, splits[0], space, folder)
    base = files.hub_id
    save_adapter(model, folder / "adapter", config.lora, base, model_card(config, files, warnings))
    plot_training(steps, folder / "training.png")
    say(f"trained {len(steps)} steps in {seconds:.1f} s")
    report_alignment(model, config, splits, folder, warnings)


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


def _train(
    model: EarlyModel, config: RunConfig, train: Split, space: PairSpace, folder: Path
) -> tuple[list[dict[str, Any]], list[str], float]:
    steps: list[dict[str, Any]] = []
    warnings: list[str] = []
    start = time.perf_counter()
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as metrics:
        trainer = Trainer(model, config, train, space, lambda s: None, lambda w: None)
        with progress("train", trainer.total_steps) as advance:

            def on_step(step: StepMetrics) -> None:
                steps.append(step.to_json())
                _append(metrics, steps[-1])
                advance(1, f"loss {step.loss:.4f}")

            def on_warning(line: str) -> None:
                warnings.append(line)
                warn(line)

            trainer.on_step, trainer.on_warning = on_step, on_warning
            trainer.run()
    return steps, warnings, time.perf_counter() - start


def _append(file: TextIO, values: dict[str, Any]) -> None:
    file.write(json.dumps(values) + "\n")
    file.flush()
