"""The report as a page that opens anywhere, and as a card."""

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from tli_engine.evaluate.compare.charts import Series, chart
from tli_engine.evaluate.compare.conclusions import too_small
from tli_engine.evaluate.compare.config import ARMS
from tli_engine.evaluate.compare.gather import QUALITY
from tli_engine.evaluate.summaries import METRICS

Report = Mapping[str, Any]

# colour of what is of no arm
_NEUTRAL = 5
# an en dash
_NONE = "\u2013"


def report_html(report: Report) -> str:
    """One page: no script, nothing that is fetched."""
    return _render("report.html.j2", report, escape=True)


def report_card(report: Report) -> str:
    """Markdown with the header that the Hub reads."""
    return _render("card.md.j2", report, escape=False)


def _render(template: str, report: Report, escape: bool) -> str:
    environment = Environment(
        autoescape=escape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "score": _score,
        "interval": _interval,
        "p": _p,
        "duration": _duration,
        "figures": _figures,
    }
    text = (files(__package__) / template).read_text(encoding="utf-8")
    return environment.from_string(text).render(
        report=report,
        metrics=METRICS,
        colours={arm: i for i, arm in enumerate(ARMS)},
        charts=_charts(report) if escape else [],
        too_small=too_small(report),
        p_values={(t["arm"], t["metric"]): t["p_holm"] for t in report["tests"]},
    )


def _charts(report: Report) -> list[dict[str, str]]:
    arms = report["arms"]
    quality = METRICS[QUALITY]
    split = "unseen pairs" if _is_unseen(report) else "pairs"
    return [
        {
            "title": "Quality against memory",
            "svg": chart(_against(arms, "peak_mib", 2**-10), "peak memory, GiB", quality),
        },
        {
            "title": "Quality against time",
            "svg": chart(
                _against(arms, "wall_seconds", 1 / 60), "training, minutes", quality, from_zero=True
            ),
        },
        {
            "title": "Loss of training",
            "svg": chart(_losses(arms, "training"), "step", "nats a token"),
        },
        {
            "title": "Loss on unseen articles",
            "svg": chart(_losses(arms, "validation"), "step", "nats a token"),
        },
        {
            "title": f"Retrieval of {split} by layer (dashed: before)",
            "svg": chart(_layers(arms, "mrr"), "hidden_states index", "two-way MRR"),
        },
        {
            "title": f"Separation of {split} by layer (dashed: before)",
            "svg": chart(
                _layers(arms, "separation"), "hidden_states index", "true less random cosine"
            ),
        },
    ]


def _is_unseen(report: Report) -> bool:
    return all(arm["alignment"]["split"] == "control" for arm in report["arms"])


def _against(arms: list[Report], cost: str, scale: float) -> list[Series]:
    """Each arm's score with its interval, and those of its seeds."""
    series = []
    for arm in arms:
        text, x, colour = arm["text"][QUALITY], arm[cost] * scale, ARMS.index(arm["name"])
        label = f"{arm['name']}: {text['score']:.2f}"
        points = [(x, score) for score in text["by_seed"]]
        low_high = [tuple(text["ci95"])]
        series.append(Series(label, colour, [(x, text["score"])], "big", low_high))
        series.append(Series(f"{arm['name']}, one seed", colour, points, "dots"))
    return series


def _losses(arms: list[Report], kind: str) -> list[Series]:
    return [
        Series(
            f"{arm['name']}, seed {curve['seed']}",
            ARMS.index(arm["name"]),
            [tuple(point) for point in curve[kind]],
        )
        for arm in arms
        for curve in arm["curves"]
    ]


def _layers(arms: list[Report], figure: str) -> list[Series]:
    def points(arm: Report, stage: str) -> list[tuple[float, float]]:
        return [(row["layer"], row[stage][figure]) for row in arm["alignment"]["layers"]]

    before = [Series("before training", _NEUTRAL, points(arm, "before"), "dashed") for arm in arms]
    after = [Series(arm["name"], ARMS.index(arm["name"]), points(arm, "after")) for arm in arms]
    # the base model is the same for all
    return [*before[:1], *after]


def _score(value: float | None, digits: int = 2) -> str:
    return _NONE if value is None else f"{value:z.{digits}f}"


def _interval(ends: list[float | None], digits: int = 2) -> str:
    return _NONE if None in ends else f"{ends[0]:z.{digits}f} to {ends[1]:z.{digits}f}"


def _p(value: float | None) -> str:
    if value is None:
        return _NONE
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _figures(value: float | None, digits: int = 0) -> str:
    return _NONE if value is None else f"{value:,.{digits}f}"
