"""The work of ``tli-engine compare``: one run after the other, then the report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tli_engine.cli._compare_lock import LOCKS, in_turn
from tli_engine.cli._compare_made import check_alike, difference, read_made
from tli_engine.cli._compare_processes import LOGS, run_parts
from tli_engine.cli._compare_run import check_part, run_part
from tli_engine.cli._comparison import BASE, Comparison, mend
from tli_engine.cli.console import plain_table, say, show, warn
from tli_engine.cli.signals import STOPPED
from tli_engine.config import RunConfig, dump_yaml, read_yaml, with_absolute_paths
from tli_engine.data.texts import has_articles
from tli_engine.errors import ConfigError, UserError
from tli_engine.evaluate.compare.conclusions import conclusions
from tli_engine.evaluate.compare.config import CompareConfig
from tli_engine.evaluate.compare.figures import RESULT, measured_at
from tli_engine.evaluate.compare.gather import Part, gather
from tli_engine.evaluate.compare.rates import TRIED, Tried
from tli_engine.evaluate.compare.report import report_card, report_html
from tli_engine.evaluate.records import unreadable
from tli_engine.evaluate.summaries import (
    METRICS,
    PREDICTIONS,
    language_of,
    read_predictions,
    spacing_warning,
)
from tli_engine.train.metrics import read_metrics
from tli_engine.train.run_folder import check_writable, part_of, plain_json, write_json, write_text

_SETTINGS = "compare.yaml"
# may differ between calls: they say how much is compared and how it is scored, not what
_GROWING = ("compare.arms", "compare.seeds", "data.language")


def run_comparison(
    shared: RunConfig,
    settings: CompareConfig,
    out: Path,
    only: Sequence[str],
    *,
    gather_only: bool,
    jobs: int,
    side_by_side: int,
) -> int:
    """Run what has no figures yet, each part in a process of its own, and report."""
    comparison = Comparison(with_absolute_paths(shared), settings, out, side_by_side)
    known = [*comparison.trials, *comparison.parts]
    if unknown := [part for part in only if part not in known]:
        raise ConfigError(f"--only {unknown[0]}: no such run; there are {' '.join(known)}")
    # before anything is written, and hours of what reads none of them
    _check_articles(comparison)
    _keep_settings(comparison, gather_only)
    if len(only) == 1 and jobs == 1:
        return run_part(comparison, only[0])
    failed: list[str] = []
    # rates first: the arms take those that are chosen of them
    for names in (comparison.trials, comparison.parts):
        asked = [] if gather_only else [name for name in only or names if name in names]
        found = _run(comparison, asked, jobs)
        if found is None:
            say("stopped; the same command goes on")
            return STOPPED[0]
        failed += found
        if found and names is comparison.trials:
            warn("no arm is begun: its learning rate is chosen when all of compare.rates are tried")
            return 1
    if not only:
        _report(comparison)
    return 1 if failed else 0


def _check_articles(comparison: Comparison) -> None:
    """Open all articles; refuse to choose learning rates by none, or by those that are tested on."""
    comparison.test_texts()
    there = {*comparison.present.articles}
    if has_articles(comparison.shared.data, "test"):
        there.add("test")
    for split in ("validation", "test") if comparison.trials else ():
        if split not in there:
            raise UserError(
                f"data.{split}: compare.rates chooses by the loss on data.validation, and tests on "
                "data.test; give both"
            )


def _run(comparison: Comparison, parts: Sequence[str], jobs: int) -> list[str] | None:
    """Run what is not done of some parts; those that failed, or None if all were asked to stop."""
    waiting = []
    for part in parts:
        if comparison.is_done(part):
            # held against what is there now, before hours of the others
            run_part(comparison, part)
        else:
            waiting.append(part)
    failed = []
    for turn in [waiting] if jobs > 1 else [[part] for part in waiting]:
        if jobs == 1:
            say(f"{turn[0]}:")
        for part, status in _in_processes(comparison, turn, jobs).items():
            if status in STOPPED:
                return None
            if status:
                failed.append(part)
                warn(f"{part}: failed; the others go on")
    return failed


def _in_processes(comparison: Comparison, parts: Sequence[str], jobs: int) -> dict[str, int]:
    """Run parts apart from each other, whose memory would count as one's own; their statuses."""
    return run_parts(comparison.out, comparison.out / _SETTINGS, parts, jobs)


def _keep_settings(comparison: Comparison, gather_only: bool) -> None:
    """Write what is compared into the folder, or see that it is what the folder was begun with."""
    out = comparison.out
    path = out / _SETTINGS
    values = {"compare": comparison.settings.model_dump(mode="json")}
    values |= comparison.shared.model_dump(mode="json", exclude={"provenance"})
    # of a comparison that was killed as it began
    own = (path, out / LOGS, out / LOCKS, out / part_of(_SETTINGS))
    others = [p for p in out.iterdir() if p not in own] if out.is_dir() else []
    if not path.is_file() and (gather_only or others):
        raise UserError(f"{out}: is no comparison's folder; it has no {_SETTINGS}")
    key = difference(values, read_yaml(path), growing=_GROWING) if others else None
    if key is not None:
        raise UserError(f"{out}: was begun with another {key}; choose another --out")
    check_writable(out)
    out.mkdir(parents=True, exist_ok=True)
    text = dump_yaml(values)
    with in_turn(out / LOCKS / "settings"):
        # runs that begin at the same time all find it as it is
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)


def _report(comparison: Comparison) -> None:
    """Gather what is there; write ``report.json``, ``report.html`` and the card."""
    report = plain_json(_gathered(comparison))
    out = comparison.out
    write_json(out / "report.json", report)
    write_text(out / "report.html", report_html(report))
    write_text(out / "README.md", report_card(report))
    _show(report)
    for line in report["conclusions"]:
        print(f"- {line}")
    say(f"report: {out / 'report.html'}")


def _gathered(comparison: Comparison) -> dict[str, Any]:
    shared, settings = comparison.shared, comparison.settings
    texts = comparison.test_texts()
    digest = texts.digest()
    parts = {
        part: _read_part(comparison, part) for part in comparison.parts if comparison.is_done(part)
    }
    _check_alike(comparison, parts)
    _check_rows(comparison, parts)
    made_with = _versions([part.result for part in parts.values()])
    base = parts.pop(BASE, None)
    if not parts:
        raise UserError(f"{comparison.out}: no run has its figures yet")
    articles = [texts[i] for i in range(len(texts))]
    language = language_of(shared.data)
    if line := spacing_warning(articles, language):
        warn(line)
    report = gather(settings, list(parts.values()), base, articles, language)
    some = next(iter(parts.values())).result
    report["data"] = {
        "model": _shown_name(shared.model),
        "base_model": _shown_name(some["base_model"]),
        "texts": _shown_name(shared.data.texts),
        "pairs": _shown_name(shared.data.pairs),
        "test": _shown_name(texts.name),
        "hash": digest,
        "counts": {"train": len(comparison.present.articles.get("train", ())), "test": len(texts)},
        "selected_on_test": not has_articles(shared.data, "test"),
        "max_new_tokens": settings.max_new_tokens,
        "beams": settings.beams,
        "seconds": settings.seconds,
        "devices": sorted({part.result["device_name"] for part in parts.values()}),
    }
    report["versions"] = made_with
    report["rates"] = [{k: tried[k] for k in Tried.model_fields} for tried in comparison.tried]
    missing = [p for p in comparison.parts if not comparison.is_done(p)]
    report["conclusions"] = conclusions(report, missing)
    return report


def _check_alike(comparison: Comparison, parts: Mapping[str, Part]) -> None:
    """Hold parts against each other; say which ones cannot be, once."""
    made = {}
    for name, part in parts.items():
        folder, configs = comparison.folder(name), comparison.configs(name)
        found = read_made(folder / RESULT, part.result, len(configs), mend(name))
        if found is None:
            warn(f"{folder}: an earlier version made it, which did not record from what")
        else:
            made[folder] = found, configs
    # rates were chosen for these weights and tokens
    for name, tried in zip(comparison.trials, comparison.tried, strict=True):
        folder = comparison.folder(name)
        found = read_made(folder / TRIED, tried, 1, mend(name))
        assert found is not None
        made[folder] = found, [comparison.trial_config(name)]
    check_alike(made)


def _check_rows(comparison: Comparison, parts: Mapping[str, Part]) -> None:
    """Refuse alignment that was measured at other layers or on other splits than that of the others."""
    trained = [name for name in parts if name != BASE]
    for name in trained[1:]:
        if measured_at(parts[name].result) != measured_at(parts[trained[0]].result):
            path = comparison.folder(name) / RESULT
            reason = f"alignment: its layers, scores and splits are not those of {trained[0]}"
            raise unreadable(path, reason, mend(name))


def _shown_name(name: str | None) -> str | None:
    """A name as a report shows it: where a file lies is this machine's business."""
    return Path(name).name if name and Path(name).is_absolute() else name


def _versions(results: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Of each package, all that parts were made with."""
    found: dict[str, list[str]] = {}
    for result in results:
        for name, version in result["versions"].items():
            found.setdefault(name, []).append(version)
    return {name: " and ".join(sorted({*all_of_it})) for name, all_of_it in found.items()}


def _read_part(comparison: Comparison, part: str) -> Part:
    folder, result = comparison.folder(part), check_part(comparison, part)
    arm, _, seed = part.rpartition(":")
    # tli-engine evaluate may have written others since
    own = result.get("predictions", {}).get("sha256")
    predictions = read_predictions(folder / PREDICTIONS, own)
    metrics = read_metrics(folder)
    return Part(arm or BASE, int(seed) if arm else 0, result, predictions, metrics)


def _show(report: dict[str, Any]) -> None:
    table = plain_table("summaries of the test articles")
    for column in ("arm", "seeds"):
        table.add_column(column)
    for name in (*METRICS.values(), "peak MiB", "training"):
        table.add_column(name, justify="right")
    for arm in report["arms"]:
        scores = (f"{arm['text'][m]['score']:.2f}" for m in METRICS)
        costs = (f"{arm['peak_mib']:,.0f}", f"{arm['wall_seconds']:,.0f} s")
        table.add_row(arm["name"], str(len(arm["seeds"])), *scores, *costs)
    for name, baseline in report["baselines"].items():
        table.add_row(name, "", *(f"{baseline[m]['score']:.2f}" for m in METRICS))
    show(table)
