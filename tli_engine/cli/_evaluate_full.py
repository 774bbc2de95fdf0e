"""What ``tli-engine evaluate`` measures on word pairs where all weights were trained: two models."""

import time
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from tli_engine.align.encode import encode
from tli_engine.cli._bits import bits_of, costs_of
from tli_engine.cli._evaluate import report_again, scored, splits_of
from tli_engine.cli._summaries import stages
from tli_engine.cli.console import progress
from tli_engine.config import RunConfig
from tli_engine.data.splits import Split
from tli_engine.evaluate.alignment import Vectors, layer_curve
from tli_engine.evaluate.bits_per_byte import read_lines
from tli_engine.evaluate.plots import plot_layer_curve
from tli_engine.models.early import EarlyModel
from tli_engine.models.files import open_model

_ByLayer = dict[int, Tensor]


def evaluate_full(
    folder: Path,
    config: RunConfig,
    final_layer: bool,
    texts: Sequence[Path],
    strengths: Sequence[float],
    device: str | None,
) -> None:
    """Measure the base model and then the trained one, only one of which is held at a time.

    ``strengths`` are 1 alone: there is no adapter that could be scaled.
    """
    lines = {str(path): read_lines(path) for path in texts}
    files = open_model(config.model)
    splits = splits_of(config, files)
    total: int = files.config.num_hidden_layers
    layers = sorted({config.align.layer, total}) if final_layer else [config.align.layer]
    encoded: dict[str, list[_ByLayer]] = {}
    bits: dict[str, dict[str, float]] = {}
    start = time.perf_counter()
    for stage, model in stages(folder, config, files, device):
        early = model.early
        encoded[stage] = _encode(early, splits, config, layers, stage, curve=final_layer)
        bits[stage] = bits_of(model, files.tokenizer, lines)
        # the next stage is another model
        del early, model
    words = 2 * sum(len(set(split.words)) for split in splits)
    both = [
        {k: Vectors(split, before[k], after[k]) for k in before}
        for split, before, after in zip(splits, encoded["before"], encoded["after"], strict=True)
    ]
    per_second = words / (time.perf_counter() - start)
    measured = scored([both], config, layers, strengths, per_second)
    if final_layer:
        curve = layer_curve(both[-1])
        plot_layer_curve(curve, config.align.layer, splits[-1].name, folder / "layers.png")
    costs = costs_of(bits["before"], {"1.0": bits["after"]}) if lines else None
    report_again(measured, config, folder, costs)


def _encode(
    model: EarlyModel,
    splits: Sequence[Split],
    config: RunConfig,
    layers: Sequence[int],
    stage: str,
    *,
    curve: bool,
) -> list[_ByLayer]:
    """Vectors of each split by layer; of the last one at all layers, for a curve."""
    words = sum(len(set(split.words)) for split in splits)
    found = []
    with progress(f"word pairs {stage}", words) as advance:
        for split in splits:
            wanted = range(model.depth + 1) if curve and split is splits[-1] else layers
            pooling = config.align.pooling
            vectors = encode(model, split.words, wanted, pooling, lambda n: advance(n, ""))
            found.append(dict(zip(wanted, vectors, strict=True)))
    return found
