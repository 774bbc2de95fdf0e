"""What a comparison shows, in words, and what it cannot show."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tli_engine.align.bootstrap import too_few_pairs
from tli_engine.evaluate.compare.figures import SHOWN_SCORE
from tli_engine.evaluate.compare.gather import QUALITY
from tli_engine.evaluate.compare.rates import rates_in_words
from tli_engine.evaluate.summaries import METRICS

# fewer than these show no more than a tendency
ENOUGH_SEEDS = 3
ENOUGH_ARTICLES = 200
_ALPHA = 0.05
_DIRECTIONS = "Up or down is what every seed's 95 % interval says"

Report = Mapping[str, Any]


def conclusions(report: Report, missing: Sequence[str] = ()) -> list[str]:
    """Sentences, the most important first.

    Args:
        report: As :func:`tli_engine.evaluate.compare.gather.gather` makes it, with ``data``.
        missing: Runs that have no figures.
    """
    lines = list(_size(report, bool(missing)))
    if missing:
        lines.append(
            f"Of the runs {len(missing)} {'is' if len(missing) == 1 else 'are'} missing, failed or yet to "
            f"be run: {', '.join(missing)}."
        )
    lines += _empty(report)
    lines += _overtrained(report)
    lines += _against(report)
    lines += _baselines(report)
    # earlier reports tried none
    lines += rates_in_words(report.get("rates", []))
    lines += _costs(report)
    lines += _alignment(report)
    lines += _budget(report)
    lines.append(
        "The tests and intervals are over test articles with these seeds: they do not say how other "
        "seeds, data, models or learning rates would come out. Each seed's score is shown beside them."
    )
    return lines


def too_small(report: Report) -> str | None:
    """Why there is nothing to conclude; ``None`` where there is enough."""
    articles = report["data"]["counts"]["test"]
    seeds = min((len(arm["seeds"]) for arm in report["arms"]), default=0)
    reasons = []
    if articles < ENOUGH_ARTICLES:
        reasons.append(f"{articles} test articles, and it takes {ENOUGH_ARTICLES}")
    if seeds < ENOUGH_SEEDS:
        reasons.append(f"{_count(seeds, 'seed')} an arm, and it takes {ENOUGH_SEEDS}")
    return "; ".join(reasons) or None


def _size(report: Report, unfinished: bool) -> Iterator[str]:
    reason = too_small(report)
    if reason is not None:
        yield f"Too small to conclude: there are {reason}. Read what follows as a demonstration."
    elif unfinished:
        yield "Not finished: what follows is of the runs that are done."


def _empty(report: Report) -> Iterator[str]:
    articles = report["data"]["counts"]["test"]
    said = [
        f"{arm['name']} {arm['empty_summaries']} of {articles * len(arm['seeds'])}"
        for arm in report["arms"]
        if arm["empty_summaries"]
    ]
    if said:
        yield f"Some summaries are empty, which scores 0 whatever was learnt: {_listed(said)}."


def _overtrained(report: Report) -> Iterator[str]:
    """Arms that only got worse: what is said of them may be said of their learning rate alone."""
    said = []
    for arm in report["arms"]:
        measured = [[at for at in c["validation"] if math.isfinite(at[1])] for c in arm["curves"]]
        curves = [curve for curve in measured if len(curve) > 1]
        risen = [curve[0][0] for curve in curves if min(curve, key=lambda at: at[1]) is curve[0]]
        if 2 * len(risen) > len(curves):
            of = f"{len(risen)} of {_count(len(curves), 'seed')}"
            said.append(f"{arm['name']} (step {risen[0]}, {of})")
    if said:
        yield (
            f"{_listed(said)}: the loss on unseen articles was lowest when it was first measured, and "
            "rose from there. The learning rate was too high or the steps too many for a fair "
            "comparison: try smaller ones."
        )


def _against(report: Report) -> Iterator[str]:
    """Each arm against the reference, by every metric; those that nothing tells apart in one line."""
    reference = report["reference"]
    arms = {arm["name"]: arm for arm in report["arms"]}
    hedge = " (too small to conclude)" if too_small(report) else ""
    level: list[str] = []
    farthest = 0.0
    for name, arm in arms.items():
        tests = [t for t in report["tests"] if t["arm"] == name]
        if not tests:
            continue
        parts = [
            f"{word} by {_listed([_figure(t, arm, arms[reference]) for t in shown])}"
            for word, sign in (("better", 1), ("worse", -1))
            if (shown := [t for t in tests if _is_shown(t) and t["difference"] * sign > 0])
        ]
        undecided = [METRICS[t["metric"]] for t in tests if not _is_shown(t)]
        if not parts:
            level.append(name)
            farthest = max(farthest, *(_farthest(t) for t in tests))
            continue
        if undecided:
            parts.append(f"not to be told apart by {_listed(undecided)}")
        yield f"{name} against {reference}: {'; '.join(parts)}{hedge}."
    if level:
        yield (
            f"{_listed(level)} against {reference}: not to be told apart by any metric, which is not "
            f"the same as equal: their intervals hold differences of up to {farthest:.1f} points{hedge}."
        )


def _farthest(test: Mapping[str, Any]) -> float:
    low, high = map(float, test["ci95"])
    return abs(float(test["difference"])) if math.isnan(low) else max(abs(low), abs(high))


def _is_shown(test: Mapping[str, Any]) -> bool:
    # NaN is not below it
    return bool(test["p_holm"] < _ALPHA)


def _figure(test: Mapping[str, Any], arm: Report, reference: Report) -> str:
    """A difference, and whether every seed agrees."""
    metric = test["metric"]
    scores = [
        [
            s
            for s, seed in zip(a["text"][metric]["by_seed"], a["seeds"], strict=True)
            if seed in test["seeds"]
        ]
        for a in (arm, reference)
    ]
    apart = min(scores[0]) > max(scores[1]) or max(scores[0]) < min(scores[1])
    agree = "" if apart else ", though seeds overlap"
    return f"{METRICS[metric]} ({test['difference']:+.1f}, p = {test['p_holm']:.2g}{agree})"


def _baselines(report: Report) -> Iterator[str]:
    """Which arms are worth more than what costs nothing."""
    hedge = " (too small to conclude)" if too_small(report) else ""
    for name, scores in report["baselines"].items():
        floor = scores[QUALITY]["score"]
        places: dict[str, list[str]] = {"above it": [], "below it": [], _LEVEL: []}
        for found in (f for f in report["against_baselines"] if f["against"] == name):
            low, high = found["ci95"]
            # NaN is neither
            place = "above it" if low > 0 else "below it" if high < 0 else _LEVEL
            places[place].append(f"{found['arm']} ({found['difference']:+.1f})")
        said = [f"{_listed(arms)} {place}" for place, arms in places.items() if arms]
        yield f"{_BASELINES[name]} ({name}): ROUGE-L {floor:.1f}; {'; '.join(said)}{hedge}."


_LEVEL = "not to be told from it"
_BASELINES = {
    "zero-shot": "The base model, untrained",
    "lead-1": "An article's first sentence",
    "lead-3": "An article's first three sentences",
    "random-summary": "Another article's summary, drawn at random",
}


def _costs(report: Report) -> Iterator[str]:
    arms = {arm["name"]: arm for arm in report["arms"]}
    reference = arms.pop(report["reference"], None)
    said = []
    for name, arm in arms.items() if reference else ():
        share = arm["trainable_parameters"] / reference["trainable_parameters"]
        parts = [f"{100 * share:.2g} % of the parameters"]
        if arm["devices"] == reference["devices"]:
            parts.append(f"{arm['peak_mib'] / reference['peak_mib']:.2f} times the peak memory")
        timed_alike = arm["timed_devices"] == reference["timed_devices"]
        if timed_alike and arm["side_by_side"] == reference["side_by_side"] == 1:
            parts.append(f"{arm['wall_seconds'] / reference['wall_seconds']:.2f} times the time")
        if timed_alike and arm["energy_joules"] and reference["energy_joules"]:
            ratio = arm["energy_joules"] / reference["energy_joules"]
            parts.append(f"{ratio:.2f} times the energy")
        said.append(f"{name} {', '.join(parts)}")
    if said:
        yield f"Training took, of what {report['reference']} took: {'; '.join(said)}."
    kinds = {arm["name"]: " and ".join(arm["computed"]) for arm in report["arms"]}
    if len({*kinds.values()}) > 1:
        how = "; ".join(f"{name} in {kind}" for name, kind in kinds.items())
        yield (
            f"The arms were not computed alike, which may be part of any difference: {how}. Times and "
            "energy are compared only of arms that were timed on the same kind of device."
        )
    shared = [arm["name"] for arm in report["arms"] if arm["side_by_side"] > 1]
    if shared:
        yield (
            f"{_listed(shared)} ran side by side with others on one device: times and tokens/s are what "
            "was left to each, energy cannot be told, and no conclusion about speed follows."
        )
    if any(device == "cpu" for arm in report["arms"] for device in arm["devices"]):
        yield (
            "On a CPU, memory is the whole process's, libraries included, and a time holds whatever else "
            "the machine did: their ratios say little of a GPU's."
        )


def _alignment(report: Report) -> Iterator[str]:
    """Whether unseen pairs find each other better, by a score that a common shift cannot inflate."""
    said = []
    # all arms are measured on the same pairs
    few = too_few_pairs(report["arms"][0]["alignment"]["pairs"], "a change")
    for arm in report["arms"]:
        found = arm["alignment"]
        row = next(
            r for r in found["rows"] if r["split"] == found["split"] and r["score"] == SHOWN_SCORE
        )
        verdict = "" if few else f" ({_direction(row['mrr_change_ci95'])})"
        said.append(f"{arm['name']} {row['after']['mrr']:.3f}{verdict}")
    head = next(r for r in found["linear_head"] if r["split"] == found["split"])
    unseen = found["split"] == "control"
    pairs = _count(found["pairs"], "unseen pair" if unseen else "pair")
    pairs += "" if unseen else ", none of them unseen,"
    yield (
        f"Retrieval of {pairs} at layer {row['layer']} (MRR, centred), "
        f"{row['before']['mrr']:.3f} before training; after it: {', '.join(said)}. "
        f"{few or _DIRECTIONS}. A linear head on the frozen model, fitted in seconds, has "
        f"{head['after']['mrr']:.3f}."
    )


def _direction(intervals: Sequence[Sequence[float]]) -> str:
    """Where every seed's interval lies."""
    ends = [end for interval in intervals for end in interval]
    up, down = (all(sign * end > 0 for end in ends) for sign in (1, -1))
    return "up" if up else "down" if down else "no clear change"


def _budget(report: Report) -> Iterator[str]:
    if report["data"].get("seconds"):
        yield (
            f"Every arm had {report['data']['seconds']:g} s of training, all its runs together; "
            "slower ones did fewer steps."
        )
    elif any(arm["name"] == "tli-then-lora-early" for arm in report["arms"]):
        yield (
            "Arms had the same steps on the same articles. tli-then-lora-early had its steps on word "
            "pairs besides, which its time and energy hold."
        )


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
