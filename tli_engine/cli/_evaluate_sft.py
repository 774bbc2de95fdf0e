"""What ``tli-engine evaluate`` measures of a run on summaries: its loss, and what it writes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tli_engine.cli._against import hold_against, read_rival
from tli_engine.cli._bits import bits_of, costs_of, print_costs
from tli_engine.cli._summaries import Summariser, stages
from tli_engine.cli.console import plain_table, progress, say, show, warn
from tli_engine.cli.evaluate import Writing
from tli_engine.config import RunConfig
from tli_engine.data.examples import tokenise
from tli_engine.data.texts import Article, Texts, read_texts
from tli_engine.errors import UserError
from tli_engine.evaluate.bits_per_byte import read_lines
from tli_engine.evaluate.compare.figures import RESULT
from tli_engine.evaluate.records import read_evaluation
from tli_engine.evaluate.summaries import (
    METRICS,
    PREDICTIONS,
    Written,
    language_of,
    predictions_record,
    predictions_text,
    spacing_warning,
)
from tli_engine.evaluate.text_baselines import baseline_texts
from tli_engine.evaluate.text_metrics import TextScores, score_texts
from tli_engine.models.adapters import adapter_strength
from tli_engine.models.causal import CausalModel
from tli_engine.models.files import ModelFiles, open_model
from tli_engine.train.manifest import problems
from tli_engine.train.run_folder import write_json, write_text
from tli_engine.train.sft_prepare import validation_of
from tli_engine.train.sft_step import mean_loss


@dataclass(frozen=True)
class _Measured:
    """What a model comes to: its loss on the articles, its summaries, bits per byte of each file."""

    loss: float
    written: Written
    bits: dict[str, float]


def evaluate_texts(
    folder: Path,
    config: RunConfig,
    device: str | None,
    writing: Writing,
    strengths: Sequence[float],
    files: Sequence[Path],
) -> None:
    """Measure a run on ``data.validation``; write ``predictions.jsonl`` and ``evaluation.json``.

    Bits per byte of ``files`` are measured beside. What stands for the run, against others too, is the
    last of ``strengths``.

    Raises:
        UserError: The run has no articles to measure on, those of ``writing.against`` are others, or it is
            a comparison's.
    """
    if (folder / RESULT).is_file():
        raise UserError(
            f"{folder}: is a comparison's run, whose {RESULT} is of the summaries that evaluate would "
            f"replace; copy the folder without {RESULT}, and evaluate the copy"
        )
    texts = _validation(folder, config)
    rival = None if writing.against is None else read_rival(writing.against, texts)
    lines = {str(path): read_lines(path) for path in files}
    base = open_model(config.model)
    articles = [texts[i] for i in range(len(texts))]
    how = {
        name: getattr(writing, name)
        for name in ("batch_size", "beams", "temperature", "top_p", "seed")
    }
    summariser = Summariser.prepare(articles, base, config, writing.max_new_tokens, **how)
    before, after = _both(folder, config, base, texts, summariser, device, strengths, lines)
    last = str(strengths[-1])
    predictions = predictions_text(after[last].written.summaries)
    write_text(folder / PREDICTIONS, predictions)
    record = predictions_record(predictions, texts, summariser.options, strengths[-1])
    language = writing.language or language_of(config.data)
    if line := spacing_warning(articles, language):
        warn(line)
    scores, found = _scored(articles, language, before, after, last)
    found["predictions"] = record
    if lines:
        bits = {strength: measured.bits for strength, measured in after.items()}
        found["bits_per_byte"] = costs_of(before.bits, bits)
        print_costs(found["bits_per_byte"])
    if rival is not None:
        references = [article.summary for article in articles]
        found["against"] = hold_against(rival, scores, references, language, record["decoding"])
    _record(folder, found)


def _scored(
    articles: Sequence[Article],
    language: str | None,
    before: _Measured,
    after: Mapping[str, _Measured],
    last: str,
) -> tuple[TextScores, dict[str, Any]]:
    """Score what was written, print that; the last strength's scores, and everything for JSON."""
    references = [article.summary for article in articles]
    texts = {name: measured.written.summaries for name, measured in after.items()}
    own = {name: score_texts(summaries, references, language) for name, summaries in texts.items()}
    others = baseline_texts([article.text for article in articles], references)
    others["zero-shot"] = before.written.summaries
    scores = {n: score_texts(t, references, language).report() for n, t in others.items()}
    reports = {strength: score.report() for strength, score in own.items()}
    losses = {strength: measured.loss for strength, measured in after.items()}
    for strength, loss in losses.items():
        print(
            f"loss on {len(articles)} unseen articles: {before.loss:.4f} → {loss:.4f} "
            f"nats a token{_at(strength)}"
        )
    _show({f"this run{_at(strength)}": report for strength, report in reports.items()} | scores)
    measured = {"before": before.loss, "after": losses[last], "after_by_strength": losses}
    return own[last], {
        "loss": {"validation": measured | {"articles": len(articles)}},
        "text": reports[last],
        "text_by_strength": reports,
        "baselines": scores,
        "generation": after[last].written.to_json(),
    }


def _at(strength: str) -> str:
    return "" if strength == "1.0" else f" at strength {strength}"


def _validation(folder: Path, config: RunConfig) -> Texts:
    texts = read_texts(config.data, "validation")
    if texts is None:
        raise UserError(f"{folder}: has no data.validation to measure on")
    recorded = (config.provenance or {}).get("texts", {}).get("validation", {})
    if recorded and recorded["sha256"] != texts.digest():
        warn(f"{texts.name}: the validation articles are not those of the run any more")
    return texts


def _both(
    folder: Path,
    config: RunConfig,
    base: ModelFiles,
    texts: Texts,
    summariser: Summariser,
    device: str | None,
    strengths: Sequence[float],
    lines: Mapping[str, list[str]],
) -> tuple[_Measured, dict[str, _Measured]]:
    """The base model, and the trained one by strength."""
    with progress(f"tokenise {texts.name}", len(texts)) as advance:
        store = tokenise(texts, summariser.examples, lambda n: advance(n, ""))
    unseen = validation_of(store, config)

    def measure(model: CausalModel, title: str) -> _Measured:
        loss = mean_loss(model, unseen.examples, unseen.batches)
        bits = bits_of(model, base.tokenizer, lines)
        return _Measured(loss, summariser.write(model, title), bits)

    after: dict[str, _Measured] = {}
    for stage, model in stages(folder, config, base, device):
        if stage == "before":
            before = measure(model, "base model")
        else:
            for strength in map(float, strengths):
                with adapter_strength(model.early, strength):
                    after[str(strength)] = measure(model, f"this run{_at(str(strength))}")
        # the next stage may be another model
        del model
    return before, after


def _show(scores: dict[str, Any]) -> None:
    table = plain_table("summaries of unseen articles, with 95 % intervals")
    table.add_column("")
    for metric in METRICS.values():
        table.add_column(metric, justify="right")
    for name, figures in scores.items():
        cells = (
            f"{f['score']:.2f} [{f['ci95'][0]:.2f}, {f['ci95'][1]:.2f}]"
            for f in (figures[m] for m in METRICS)
        )
        table.add_row(name, *cells)
    show(table)
    alike: dict[str, list[str]] = {}
    for metric, name in METRICS.items():
        alike.setdefault(next(iter(scores.values()))[metric]["signature"], []).append(name)
    for signature, names in alike.items():
        print(f"  {', '.join(names)}: {signature}")


def _record(folder: Path, found: dict[str, Any]) -> None:
    for line in problems(folder):
        warn(f"{line}: the run is not as its training left it")
    path = folder / "evaluation.json"
    earlier = read_evaluation(folder)
    # which step was the best one, training alone knows
    trained = earlier.get("loss", {}).get("validation") or {}
    found["loss"] = {"validation": trained | found["loss"]["validation"]}
    # those of word pairs, where a run has them too
    found["baselines"] = earlier.get("baselines", {}) | found["baselines"]
    write_json(path, earlier | found)
    say(f"run folder: {folder}")
