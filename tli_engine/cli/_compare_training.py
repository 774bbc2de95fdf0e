"""Training of one run of a comparison, gone on with where it was interrupted, and what stays of it."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tli_engine.cli._compare_made import check_begun
from tli_engine.cli._train import resume_training, run_training
from tli_engine.config import RunConfig, read_yaml, resolve_config
from tli_engine.evaluate.compare.figures import OfTraining
from tli_engine.evaluate.records import read_record
from tli_engine.train.manifest import problems
from tli_engine.train.metrics import read_metrics


def drop_weights(folders: Iterable[Path]) -> None:
    """Remove what runs were measured by."""
    for folder in folders:
        for name in ("adapter", "model", "checkpoints", "best"):
            shutil.rmtree(folder / name, ignore_errors=True)


def train_run(config: RunConfig, folder: Path) -> int:
    """Train a run, or what is left of it; return an exit status."""
    path = folder / "config.yaml"
    if not path.is_file():
        return run_training(config, folder.name, folder, overwrite=False)
    recorded = read_yaml(path)
    check_begun(folder, recorded, config)
    if problems(folder):
        begun = resolve_config(recorded, str(path))
        # files may lie elsewhere than where the run was begun
        here = {name: getattr(config, name) for name in ("model", "data", "lora")}
        return resume_training(begun.model_copy(update=here), folder)
    return 0


def training_figures(folders: list[Path], part: str) -> dict[str, Any]:
    """What the runs of an arm recorded of their training; the last one's where they cannot be added."""
    steps = [read_metrics(folder) for folder in folders]
    # without it the run is no longer what it was, and is not trained further
    again = f"move {folders[-1]} away and make {part} again, by compare --only {part}"
    evaluation = read_record(folders[-1] / "evaluation.json", OfTraining, again)
    peaks = [step["peak_mib"] for run in steps for step in run]
    return {
        "steps": len(steps[-1]),
        "tokens": sum(step["tokens"] for step in steps[-1]),
        "tokens_per_s": evaluation["throughput"]["tokens_per_s"],
        "peak_mib": max(peaks),
        "wall_seconds": sum(step["seconds"] for run in steps for step in run),
        "loss": evaluation["loss"]["validation"],
        "warnings": evaluation["warnings"],
    }
