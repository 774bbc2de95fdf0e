"""From the figures of each run to the report's: means over seeds, intervals, tests."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tli_engine.data.texts import Article
from tli_engine.evaluate.compare.config import CompareConfig
from tli_engine.evaluate.significance import (
    approximate_randomization,
    holm,
    paired_bootstrap,
)
from tli_engine.evaluate.summaries import METRICS
from tli_engine.evaluate.text_baselines import baseline_texts
from tli_engine.evaluate.text_metrics import RESAMPLES, Metric, Score, pool, score_texts

# the metric by which arms are held against baselines, and of the charts
QUALITY: Metric = "rougeL"
# points of a curve in the report at the most
_POINTS = 120
# what a part's figures say of its making; earlier versions did not record it
MADE_FROM = "made_from"


@dataclass(frozen=True)
class Part:
    """What one run left.

    Attributes:
        arm: Its arm, or ``base``.
        seed: Its seed.
        result: Its figures.
        predictions: Its summaries of the test articles.
        steps: Figures of each step.
    """

    arm: str
    seed: int
    result: Mapping[str, Any]
    predictions: list[str]
    steps: list[dict[str, Any]]


# scores of each metric by seed
_Scores = dict[int, dict[str, Score]]


def gather(
    settings: CompareConfig,
    parts: Sequence[Part],
    base: Part | None,
    articles: Sequence[Article],
    language: str | None,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """The arms' figures, the baselines' and the tests, as ``report.json`` has them.

    Args:
        settings: What is compared.
        parts: The runs that are done.
        base: The base model's summaries, if it has written them.
        articles: The test articles.
        language: Of the summaries, if that is known.
        resamples: For each interval and test.
    """
    references = [article.summary for article in articles]

    def score(texts: Sequence[str]) -> dict[str, Score]:
        return {s.metric: s for s in score_texts(texts, references, language, resamples=resamples)}

    scores: dict[str, _Scores] = {}
    for part in parts:
        scores.setdefault(part.arm, {})[part.seed] = score(part.predictions)
    others = baseline_texts([article.text for article in articles], references)
    if base is not None:
        others = {"zero-shot": base.predictions} | others
    baselines = {name: score(texts) for name, texts in others.items()}
    arms = [
        _arm(arm, [p for p in parts if p.arm == arm], scores[arm], resamples)
        for arm in settings.arms
        if arm in scores
    ]
    return {
        "reference": settings.reference,
        "arms": arms,
        "baselines": {
            name: {m: s.report() for m, s in found.items()} for name, found in baselines.items()
        },
        "tests": _tests(settings.reference, scores, resamples),
        "against_baselines": _against_baselines(scores, baselines, resamples),
    }


def _arm(arm: str, parts: Sequence[Part], scores: _Scores, resamples: int) -> dict[str, Any]:
    results = [part.result for part in parts]
    # times of runs that shared their device are for want of better ones
    timed = [r for r in results if r["side_by_side"] == 1] or results
    energies = [r["energy_joules"] for r in timed]
    return {
        "name": arm,
        "method": results[0]["method"],
        "objective": results[0]["objective"],
        "layers": results[0]["layers"],
        "seeds": [part.seed for part in parts],
        "trainable_parameters": results[0]["trainable_parameters"],
        "text": {m: _pooled([s[m] for s in scores.values()], resamples) for m in METRICS},
        # such texts score 0 by every metric
        "empty_summaries": sum(not text.strip() for p in parts for text in p.predictions),
        "loss": _losses(results),
        "alignment": _alignment([r["alignment"] for r in results]),
        "tokens_per_s": _mean([r["tokens_per_s"] for r in timed]),
        "peak_mib": max(r["peak_mib"] for r in results),
        "wall_seconds": _mean([r["wall_seconds"] for r in timed]),
        "energy_joules": None if None in energies else _mean(energies),
        "steps": [r["steps"] for r in results],
        "generation_tokens_per_s": _mean([r["generation"]["tokens_per_s"] for r in timed]),
        "timed_seeds": [r["seed"] for r in timed],
        "side_by_side": max(r["side_by_side"] for r in timed),
        "devices": sorted({r["device"] for r in results}),
        "timed_devices": sorted({r["device_name"] for r in timed}),
        "computed": sorted({_computed(r) for r in results}),
        "warnings": sorted({line for r in results for line in r["warnings"]}),
        "curves": [_curve(part) for part in parts],
    }


def _computed(result: Mapping[str, Any]) -> str:
    made = result.get(MADE_FROM)
    how = "a type that was not recorded" if made is None else made["dtype"]
    if made is not None and made["nf4"]:
        how += " with NF4 weights"
    return f"{how} on {result['device_name']}"


def _pooled(scores: Sequence[Score], resamples: int) -> dict[str, Any]:
    return pool(scores, resamples=resamples).report() | {"by_seed": [s.score for s in scores]}


def _losses(results: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    measured = [r["loss"] for r in results if r["loss"] is not None]
    if not measured:
        return None
    by_seed = [loss["after"] for loss in measured]
    return {
        "before": measured[0]["before"],
        "after": None if None in by_seed else _mean(by_seed),
        "by_seed": by_seed,
    }


def _alignment(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds; of the change in MRR each seed's interval too."""
    rows = [_mean_row(same) for same in zip(*(f["rows"] for f in found), strict=True)]
    layers = [
        {
            "layer": same[0]["layer"],
            "before": same[0]["before"],
            "after": {k: _mean([s["after"][k] for s in same]) for k in ("separation", "mrr")},
        }
        for same in zip(*(f["layers"] for f in found), strict=True)
    ]
    return {
        "rows": rows,
        "linear_head": [_mean_row(s) for s in zip(*(f["linear_head"] for f in found), strict=True)],
        "layers": layers,
        "split": found[0]["split"],
        "pairs": found[0]["pairs"],
    }


def _mean_row(same: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the same row of several seeds."""
    row = {k: same[0][k] for k in ("layer", "pooling", "presentation", "score", "split")}
    for stage in ("before", "after"):
        row[stage] = {
            "separation": _mean([r[stage]["separation"] for r in same]),
            "mrr": _mean([(r[stage]["mrr"] + r[stage]["reverse"]["mrr"]) / 2 for r in same]),
        }
    row["mrr_change_ci95"] = [r["tests"]["mrr"]["ci95"] for r in same]
    return row


def _curve(part: Part) -> dict[str, Any]:
    every = max(1, -(-len(part.steps) // _POINTS))
    # each point is the mean of the steps since the last
    chunks = [part.steps[i : i + every] for i in range(0, len(part.steps), every)]
    return {
        "seed": part.seed,
        "training": [[c[-1]["step"], _mean([s["loss"] for s in c])] for c in chunks],
        "validation": [
            [s["step"], s["validation_loss"]] for s in part.steps if "validation_loss" in s
        ],
    }


def _tests(reference: str, scores: Mapping[str, _Scores], resamples: int) -> list[dict[str, Any]]:
    """Every arm against the reference, on the seeds that both have; Holm over all of them."""
    tests: list[dict[str, Any]] = []
    for arm, by_seed in scores.items():
        seeds = sorted(by_seed.keys() & scores.get(reference, {}).keys())
        if arm == reference or not seeds:
            continue
        for metric in METRICS:
            ours, theirs = (
                pool([scores[name][seed][metric] for seed in seeds], resamples=resamples)
                for name in (arm, reference)
            )
            bootstrap = paired_bootstrap(ours, theirs, resamples=resamples)
            tests.append(
                {
                    "arm": arm,
                    "against": reference,
                    "metric": metric,
                    "seeds": seeds,
                    "difference": bootstrap.difference,
                    "ci95": list(bootstrap.ci95),
                    "p": approximate_randomization(ours, theirs, trials=resamples),
                }
            )
    for test, p in zip(tests, holm([t["p"] for t in tests]), strict=True):
        test["p_holm"] = p
    return tests


def _against_baselines(
    scores: Mapping[str, _Scores], baselines: Mapping[str, dict[str, Score]], resamples: int
) -> list[dict[str, Any]]:
    """Every arm's ROUGE-L less each baseline's, on the same resamples of articles."""
    found = []
    for arm, by_seed in scores.items():
        ours = pool([score[QUALITY] for score in by_seed.values()], resamples=resamples)
        for name, theirs in baselines.items():
            apart = paired_bootstrap(ours, theirs[QUALITY], resamples=resamples)
            figures = {"difference": apart.difference, "ci95": list(apart.ci95)}
            found.append({"arm": arm, "against": name, "metric": QUALITY, **figures})
    return found


def _mean(values: Sequence[float | None]) -> float:
    # JSON has null for NaN: of a single pair there are no random ones
    return float(np.mean([math.nan if v is None else v for v in values]))
