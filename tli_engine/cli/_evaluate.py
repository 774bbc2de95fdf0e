"""The work of ``tli-engine evaluate``, and of the end of ``tli-engine train``."""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tli_engine.cli._base import check_base_files
from tli_engine.cli._bits import costs_of, print_costs
from tli_engine.cli.console import alignment_table, control_line, progress, say, show, warn
from tli_engine.cli.evaluate import OF_PAIRS, OF_SUMMARIES, Writing
from tli_engine.config import Pooling, RunConfig, read_yaml, resolve_config
from tli_engine.data.splits import Split, read_run_pairs, tokenize_splits, tokens_of
from tli_engine.data.texts import has_articles
from tli_engine.errors import UserError
from tli_engine.evaluate.alignment import (
    Row,
    Vectors,
    alignment_rows,
    encode_before_after,
    layer_curve,
)
from tli_engine.evaluate.bits_per_byte import bits_per_byte, read_lines
from tli_engine.evaluate.linear_head import linear_head_rows
from tli_engine.evaluate.plots import plot_histograms, plot_layer_curve
from tli_engine.evaluate.records import read_evaluation
from tli_engine.models.adapters import adapter_strength, adapters_off
from tli_engine.models.device import choose_device, choose_dtype, peak_mib
from tli_engine.models.early import EarlyModel, load_early
from tli_engine.models.files import ModelFiles, open_model
from tli_engine.models.peft_format import load_adapter
from tli_engine.train.manifest import problems
from tli_engine.train.run_folder import write_json

_HEAD = "lm_head.weight"


def open_run(folder: Path) -> RunConfig:
    """The configuration of a finished run."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: not a run folder; it has no config.yaml")
    config = resolve_config(read_yaml(folder / "config.yaml"), str(folder / "config.yaml"))
    result = "adapter" if config.method == "lora" else "model"
    if not (folder / result).is_dir():
        raise UserError(
            f"{folder}: has no {result} yet; finish it with tli-engine train --resume --run {folder}"
        )
    return config


def evaluate_run(
    folder: Path,
    final_layer: bool,
    texts: Sequence[Path],
    strengths: Sequence[float],
    device: str | None,
    writing: Writing,
    pooling: Pooling | None = None,
    given: Collection[str] = (),
) -> None:
    """Measure a finished run: what it does to word pairs, to summaries, or to both.

    Args:
        folder: Of the run.
        final_layer: Whether word pairs are measured at the model's end, too.
        texts: Files whose bits per byte are measured.
        strengths: Of the adapter.
        device: In place of the run's.
        writing: How summaries are written.
        pooling: Of word pairs, in place of the run's.
        given: Options that were asked for by name.

    Raises:
        UserError: One of them has no meaning for this run; or the run is not whole.
    """
    config = open_run(folder)
    _check_meant(config, strengths, given)
    # what is written beside it is found to be damaged before anything is measured
    read_evaluation(folder)
    if config.objective != "sft":
        chosen = config.align.model_copy(update={"pooling": pooling or config.align.pooling})
        of_pairs = config.model_copy(update={"align": chosen})
        if config.method == "lora":
            _evaluate_pairs(folder, of_pairs, final_layer, texts, strengths, device)
        else:
            # takes the whole model, twice
            from tli_engine.cli._evaluate_full import evaluate_full

            evaluate_full(folder, of_pairs, final_layer, texts, strengths, device)
    if _writes_summaries(config):
        # takes what runs on word pairs do without
        from tli_engine.cli._evaluate_sft import evaluate_texts

        # those of a joint run were measured with its word pairs
        beside = texts if config.objective == "sft" else ()
        evaluate_texts(folder, config, device, writing, strengths, beside)


def _writes_summaries(config: RunConfig) -> bool:
    # a run of summaries alone says that it has no articles
    return config.objective == "sft" or (config.objective == "joint" and has_articles(config.data))


def _check_meant(config: RunConfig, strengths: Sequence[float], given: Collection[str]) -> None:
    """Refuse options that would change nothing of what is measured."""
    for option in given:
        if option in OF_SUMMARIES and not _writes_summaries(config):
            raise UserError(f"{option}: this run writes no summaries")
        if option in OF_PAIRS and config.objective == "sft":
            raise UserError(f"{option}: this run has no word pairs")
    if config.method == "full" and list(strengths) != [1.0]:
        raise UserError("--strength: this run trained every weight; only an adapter can be scaled")


def _evaluate_pairs(
    folder: Path,
    config: RunConfig,
    final_layer: bool,
    texts: Sequence[Path],
    strengths: Sequence[float],
    device: str | None,
) -> None:
    lines = {str(path): read_lines(path) for path in texts}
    files = open_model(config.model)
    splits = splits_of(config, files)
    check_base_files(folder, config, files, device or config.device)
    whole = final_layer or bool(lines)
    total = files.config.num_hidden_layers
    where = choose_device(device or config.device)
    model = load_early(
        files,
        total if whole else config.align.layer,
        dtype=choose_dtype(config.dtype, where),
        device=where,
        quantize=config.quantize,
        double_quant=config.double_quant,
        numerics=config.numerics,
        weight_residency=config.weight_residency,
        # predicting text takes every row of the embeddings
        token_ids=None if lines else tokens_of(splits),
    )
    load_adapter(model, folder / "adapter")
    if config.train.engine != "modules":
        model.fuse_on_gpu()
    measured = measure(model, config, splits, strengths, final_layer)
    if final_layer:
        _curve(model, config, splits[-1], folder)
    costs = _text_costs(model, files, lines, strengths) if lines else None
    report_again(measured, config, folder, costs)


def splits_of(config: RunConfig, files: ModelFiles) -> list[Split]:
    """The run's word pairs, tokenised; says so if they are others than it was trained on."""
    pairs = read_run_pairs(config.data)
    _check_same_pairs(config, {name: p.digest() for name, p in pairs.items()})
    return tokenize_splits(pairs, files.tokenizer, config.words)


def report_again(
    measured: "Measured", config: RunConfig, folder: Path, costs: dict[str, Any] | None
) -> None:
    """Print and write what a finished run comes to; its training's warnings stand."""
    for line in problems(folder):
        warn(f"{line}: the run is not as its training left it")
    _report(measured, config, folder, read_evaluation(folder).get("warnings", []), costs)


def _check_same_pairs(config: RunConfig, digests: dict[str, str]) -> None:
    recorded = (config.provenance or {}).get("pairs", {})
    for name, digest in digests.items():
        if name in recorded and recorded[name]["sha256"] != digest:
            warn(f"{config.data.pairs}: the {name} pairs are not those of the run any more")


@dataclass(frozen=True)
class Measured:
    """Rows of the adapted model and of the linear head, vectors at the training layer, speed."""

    rows: list[Row]
    heads: list[Row]
    vectors: list[Vectors]
    words_per_s: float


def measure(
    model: EarlyModel,
    config: RunConfig,
    splits: Sequence[Split],
    strengths: Sequence[float],
    final_layer: bool,
) -> Measured:
    """Encode before and after, and score."""
    pooling, total = config.align.pooling, model.config.num_hidden_layers
    layers = sorted({config.align.layer, total}) if final_layer else [config.align.layer]
    words = sum(len(set(split.words)) for split in splits)
    start = time.perf_counter()
    with progress("evaluate", 2 * words * len(strengths)) as advance:
        encoded = [
            [
                encode_before_after(model, s, layers, pooling, strength, lambda n: advance(n, ""))
                for s in splits
            ]
            for strength in strengths
        ]
    seconds = time.perf_counter() - start
    return scored(encoded, config, layers, strengths, 2 * words * len(strengths) / seconds)


def scored(
    encoded: Sequence[Sequence[Mapping[int, Vectors]]],
    config: RunConfig,
    layers: Sequence[int],
    strengths: Sequence[float],
    words_per_s: float,
) -> Measured:
    """Figures of vectors: at each strength, of each split, by layer."""
    pooling, presentation = config.align.pooling, config.words.presentation
    rows: list[Row] = []
    heads: list[Row] = []
    for k in layers:
        for strength, by_split in zip(strengths, encoded, strict=True):
            vectors = [by_layer[k] for by_layer in by_split]
            rows += alignment_rows(vectors, k, pooling, presentation, strength)
        heads += linear_head_rows([v[k] for v in encoded[0]], k, pooling, presentation)
    vectors = [by_layer[config.align.layer] for by_layer in encoded[-1]]
    return Measured(rows, heads, vectors, words_per_s)


def _curve(model: EarlyModel, config: RunConfig, split: Split, folder: Path) -> None:
    layers = range(model.depth + 1)
    vectors = encode_before_after(model, split, layers, config.align.pooling)
    path = folder / "layers.png"
    plot_layer_curve(layer_curve(vectors), config.align.layer, split.name, path)


def _text_costs(
    model: EarlyModel,
    files: ModelFiles,
    texts: dict[str, list[str]],
    strengths: Sequence[float],
) -> dict[str, Any]:
    """Bits per byte of each text file, before and after, at each strength."""
    head = model.decoder.embed_tokens.weight
    if not files.config.tie_word_embeddings:
        if _HEAD not in files.source:
            raise UserError(f"{files.name}: has no tensor {_HEAD}; is the download complete?")
        head = files.source.read(_HEAD).to(model.device, head.dtype)
    before: dict[str, float] = {}
    after: dict[str, dict[str, float]] = {str(strength): {} for strength in strengths}
    for name, lines in texts.items():
        with progress(name, len(lines) * (1 + len(strengths))) as advance:

            def bits(lines: list[str] = lines, advance: Any = advance) -> float:
                return bits_per_byte(model, files.tokenizer, head, lines, lambda n: advance(n, ""))

            with adapters_off(model):
                before[name] = bits()
            for strength in strengths:
                with adapter_strength(model, strength):
                    after[str(strength)][name] = bits()
    return costs_of(before, after)


def report_alignment(
    model: EarlyModel, config: RunConfig, splits: list[Split], folder: Path, warnings: list[str]
) -> None:
    """Measure a run that has just ended, at its training layer; print, write JSON and a plot."""
    measured = measure(model, config, splits, [1.0], final_layer=False)
    _report(measured, config, folder, warnings, None)


def _report(
    measured: Measured,
    config: RunConfig,
    folder: Path,
    warnings: list[str],
    costs: dict[str, Any] | None,
) -> None:
    rows, heads, vectors = measured.rows, measured.heads, measured.vectors
    for k in dict.fromkeys(row.layer for row in rows):
        title = f"hidden_states[{k}], {config.align.pooling} pooling: before → after training"
        show(alignment_table([r for r in rows if r.layer == k], title))
        baseline = "the baseline to beat: the frozen model → a linear head on it"
        show(alignment_table([r for r in heads if r.layer == k], baseline))
        for row in rows:
            if row.layer == k and row.split == "control":
                print(control_line(row))
    if len(vectors) == 1:
        warn("no control pairs: what was learnt cannot be told from what was memorised")
    print_costs(costs or {})
    # what was measured before, and must not be lost
    earlier = read_evaluation(folder)
    write_json(
        folder / "evaluation.json",
        earlier
        | {
            "alignment": [row.to_json() for row in rows],
            "baselines": {"linear_head": [row.to_json() for row in heads]},
            **({"bits_per_byte": costs} if costs is not None else {}),
            "throughput": earlier.get("throughput", {}) | {"words_per_s": measured.words_per_s},
            "memory": {"peak_mib": peak_mib(vectors[0].before.device)},
            "warnings": warnings,
        },
    )
    plot_histograms(vectors, folder / "alignment.png")
    say(f"run folder: {folder}")
