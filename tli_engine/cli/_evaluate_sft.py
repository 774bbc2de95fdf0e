"""What ``tli-engine evaluate`` measures of a run on summaries: its loss, and what it writes."""

import json
from pathlib import Path
from typing import Any

from tli_engine.cli._against import hold_against, read_rival
from tli_engine.cli._summaries import Summariser, stages
from tli_engine.cli.console import plain_table, progress, say, show, warn
from tli_engine.cli.evaluate import Writing
from tli_engine.config import RunConfig
from tli_engine.data.examples import tokenise
from tli_engine.data.texts import Texts, read_texts
from tli_engine.errors import UserError
from tli_engine.evaluate.summaries import (
    METRICS,
    PREDICTIONS,
    Written,
    language_of,
    predictions_record,
    predictions_text,
)
from tli_engine.evaluate.text_baselines import baseline_texts
from tli_engine.evaluate.text_metrics import score_texts
from tli_engine.models.files import ModelFiles, open_model
from tli_engine.train.manifest import problems
from tli_engine.train.run_folder import write_json, write_text
from tli_engine.train.sft_prepare import validation_of
from tli_engine.train.sft_step import mean_loss


def evaluate_texts(folder: Path, config: RunConfig, device: str | None, writing: Writing) -> None:
    """Measure a run on ``data.validation``; write ``predictions.jsonl`` and ``evaluation.json``.

    Raises:
        UserError: The run has no articles to measure on, or those of ``writing.against`` are others.
    """
    texts = _validation(folder, config)
    references = [texts[i].summary for i in range(len(texts))]
    rival = None if writing.against is None else read_rival(writing.against, texts)
    base = open_model(config.model)
    articles = [texts[i] for i in range(len(texts))]
    how = {
        name: getattr(writing, name)
        for name in ("batch_size", "beams", "temperature", "top_p", "seed")
    }
    summariser = Summariser.prepare(articles, base, config, writing.max_new_tokens, **how)
    losses, written = _both(folder, config, base, texts, summariser, device)
    predictions = predictions_text(written["after"].summaries)
    write_text(folder / PREDICTIONS, predictions)
    language = language_of(config.data)
    text = score_texts(written["after"].summaries, references, language)
    others = baseline_texts([article.text for article in articles], references)
    others["zero-shot"] = written["before"].summaries
    scores = {n: score_texts(t, references, language).report() for n, t in others.items()}
    print(
        f"loss on {len(texts)} unseen articles: {losses['before']:.4f} → {losses['after']:.4f} "
        f"nats a token"
    )
    _show({"this run": text.report()} | scores)
    found: dict[str, Any] = {
        "loss": {"validation": losses | {"articles": len(texts)}},
        "text": text.report(),
        "baselines": scores,
        "generation": written["after"].to_json(),
        "predictions": predictions_record(predictions, texts, summariser.options),
    }
    if rival is not None:
        decoding = found["predictions"]["decoding"]
        found["against"] = hold_against(rival, text, references, language, decoding)
    _record(folder, found)


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
) -> tuple[dict[str, float], dict[str, Written]]:
    """Loss and summaries before and after training."""
    with progress(f"tokenise {texts.name}", len(texts)) as advance:
        store = tokenise(texts, summariser.examples, lambda n: advance(n, ""))
    unseen = validation_of(store, config)
    losses, written = {}, {}
    for stage, model in stages(folder, config, base, device):
        losses[stage] = mean_loss(model, unseen.examples, unseen.batches)
        written[stage] = summariser.write(model, "base model" if stage == "before" else "this run")
        # the next stage may be another model
        del model
    return losses, written


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


def _record(folder: Path, found: dict[str, Any]) -> None:
    for line in problems(folder):
        warn(f"{line}: the run is not as its training left it")
    path = folder / "evaluation.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    # which step was the best one, training alone knows
    trained = earlier.get("loss", {}).get("validation") or {}
    found["loss"] = {"validation": trained | found["loss"]["validation"]}
    # those of word pairs, where a run has them too
    found["baselines"] = earlier.get("baselines", {}) | found["baselines"]
    write_json(path, earlier | found)
    say(f"run folder: {folder}")
