"""The work of ``tli-engine evaluate``, and of the end of ``tli-engine train``."""

from pathlib import Path

from tli_engine.cli.console import alignment_table, say, show, warn
from tli_engine.config import RunConfig, read_yaml, resolve_config
from tli_engine.data.splits import Split, read_run_pairs, tokenize_splits
from tli_engine.errors import UserError
from tli_engine.evaluate.alignment import alignment_rows, encode_before_after
from tli_engine.evaluate.plots import plot_histograms
from tli_engine.models.device import choose_device, choose_dtype
from tli_engine.models.early import EarlyModel, load_early
from tli_engine.models.files import open_model
from tli_engine.models.peft_format import load_adapter
from tli_engine.train.run_folder import write_json


def evaluate_run(folder: Path, device: str | None) -> None:
    """Measure a finished run."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: not a run folder; it has no config.yaml")
    config = resolve_config(read_yaml(folder / "config.yaml"), str(folder / "config.yaml"))
    pairs = read_run_pairs(config.data)
    _check_same_pairs(config, {name: p.digest() for name, p in pairs.items()})
    where = choose_device(device or config.device)
    files = open_model(config.model)
    splits = tokenize_splits(pairs, files.tokenizer, config.words)
    dtype = choose_dtype(config.dtype, where)
    model = load_early(files, config.align.layer, dtype=dtype, device=where)
    load_adapter(model, folder / "adapter")
    report_alignment(model, config, splits, folder, [])


def _check_same_pairs(config: RunConfig, digests: dict[str, str]) -> None:
    recorded = (config.provenance or {}).get("pairs", {})
    for name, digest in digests.items():
        if name in recorded and recorded[name]["sha256"] != digest:
            warn(f"{config.data.pairs}: the {name} pairs are not those of the run any more")


def report_alignment(
    model: EarlyModel, config: RunConfig, splits: list[Split], folder: Path, warnings: list[str]
) -> None:
    """Measure before and after at the training layer; print a table, write JSON and a plot."""
    layer, pooling = config.align.layer, config.align.pooling
    vectors = [encode_before_after(model, split, layer, pooling) for split in splits]
    rows = alignment_rows(vectors, layer, pooling, config.words.presentation)
    title = f"hidden_states[{layer}], {pooling} pooling: before → after training"
    show(alignment_table(rows, title))
    if len(splits) == 1:
        warn("no control pairs: what was learnt cannot be told from what was memorised")
    report = {"alignment": [row.to_json() for row in rows], "warnings": warnings}
    write_json(folder / "evaluation.json", report)
    plot_histograms(vectors, folder / "alignment.png")
    say(f"run folder: {folder}")
