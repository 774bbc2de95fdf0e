"""The report of a comparison: figures over seeds, what it concludes, the page in a browser."""

import html
import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.image import imread

from tli_engine.evaluate.compare.charts import Series, chart
from tli_engine.evaluate.compare.conclusions import conclusions, too_small
from tli_engine.evaluate.compare.config import CompareConfig
from tli_engine.evaluate.compare.gather import Part, gather
from tli_engine.evaluate.compare.report import report_card, report_html
from tli_engine.evaluate.text_metrics import score_texts
from tli_engine.train.run_folder import plain_json

from .conftest import alignment, articles_of

Report = dict[str, Any]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def test_seeds_are_pooled_and_paired(part: Callable[..., Part]) -> None:
    articles = articles_of(30)
    parts = [part("full", s, articles) for s in (0, 1)] + [
        part("joint", s, articles) for s in (1, 2)
    ]
    parts[3].predictions[4] = " \n"
    found = gather(CompareConfig(), parts, None, articles, None, resamples=200)
    assert [arm["name"] for arm in found["arms"]] == ["full", "joint"]
    full = found["arms"][0]
    assert [arm["empty_summaries"] for arm in found["arms"]] == [0, 1]
    assert full["seeds"] == [0, 1]
    assert full["wall_seconds"] == 60.5
    assert full["loss"]["by_seed"] == [2.0, 2.1]
    scores = [score_texts(p.predictions, [a.summary for a in articles]).rougeL.score for p in parts]
    assert full["text"]["rougeL"]["by_seed"] == scores[:2]
    assert full["text"]["rougeL"]["score"] == pytest.approx(sum(scores[:2]) / 2)
    # an arm with all its seeds and a baseline are on the same articles
    lead = score_texts([a.text for a in articles], [a.summary for a in articles]).rougeL
    apart = next(t for t in found["against_baselines"] if t["against"] == "lead-3")
    assert apart["arm"] == "full"
    assert apart["difference"] == pytest.approx(sum(scores[:2]) / 2 - lead.score)
    noise = (apart["ci95"][1] - apart["ci95"][0]) / 3.92
    differences = (
        np.mean(
            [
                score_texts(p.predictions, [a.summary for a in articles]).rougeL.per_text
                for p in parts[:2]
            ],
            axis=0,
        )
        - lead.per_text
    )
    assert noise == pytest.approx(differences.std() / 30**0.5, rel=0.2)
    # only seed 1 is of both
    (test,) = (t for t in found["tests"] if t["metric"] == "rougeL")
    assert test["seeds"] == [1]
    assert test["difference"] == pytest.approx(scores[2] - scores[1])
    assert len(full["curves"][0]["training"]) == 100
    assert full["curves"][0]["training"][0] == [3, pytest.approx(3 - 1 / 300)]
    assert full["curves"][0]["validation"] == [[300, 2.0]]


def test_an_arm_that_only_got_worse_is_said(report: Callable[..., Report]) -> None:
    found = report()
    full, early = (next(a for a in found["arms"] if a["name"] == n) for n in ("full", "lora-early"))
    fell, rose = [[43, 3.3], [86, 3.2], [129, 3.25]], [[43, 3.2], [86, 3.5], [129, 3.6]]
    for curve, of_full, of_early in zip(
        full["curves"], (rose, rose, fell), (fell, fell, rose), strict=True
    ):
        curve["validation"] = of_full
        early["curves"][curve["seed"]]["validation"] = of_early
    (line,) = (s for s in conclusions(found) if "was lowest when it was first measured" in s)
    assert line.startswith("full (step 43, 2 of 3 seeds): the loss on unseen articles")
    # of a run whose loss was no number nothing rose
    for nothing in (fell, [[43, math.nan], [86, math.nan]]):
        full["curves"][0]["validation"] = nothing
        assert not any("first measured" in s for s in conclusions(found))


def test_what_is_shown_is_said(report: Callable[..., Report]) -> None:
    found = report()
    assert too_small(found) is None
    lines = conclusions(found)
    assert re.match(r"lora-early against full: better by BLEU \(\+[\d.]+, p = 0\.\d+\)", lines[0])
    assert "ROUGE-L (+" in lines[0]
    assert lines[1].startswith("joint against full: worse by BLEU (-")
    assert "though seeds overlap" not in lines[0] + lines[1]
    level = next(line for line in lines if "which is not the same as equal" in line)
    assert level.startswith("lora-all and tli-then-lora-early against full: not to be told apart")
    unclear = [t for t in found["tests"] if t["arm"] in ("lora-all", "tli-then-lora-early")]
    farthest = max(abs(end) for t in unclear for end in t["ci95"])
    assert f"their intervals hold differences of up to {farthest:.1f} points" in level
    assert not any("empty" in line for line in lines)
    found["arms"][1]["empty_summaries"] = 7
    (empty,) = (line for line in conclusions(found) if "empty" in line)
    assert empty.endswith("whatever was learnt: lora-all 7 of 600.")
    cost = next(line for line in lines if line.startswith("Training took, of what full took"))
    assert "lora-early 2 % of the parameters, 0.50 times the peak memory" in cost
    assert "1.00 times the energy" in cost
    retrieval = next(line for line in lines if line.startswith("Retrieval of 40 unseen pairs"))
    assert "0.400 before training; after it: full 0.500 (up)" in retrieval
    assert retrieval.endswith("A linear head on the frozen model, fitted in seconds, has 0.700.")
    other = next(line for line in lines if line.startswith("Another article's summary"))
    assert re.search(
        r"full \(\+\d+\.\d\), .* and tli-then-lora-early \(\+\d+\.\d\) above it; joint \(-\d+\.\d\) below it\.$",
        other,
    )
    assert "they do not say how other seeds" in lines[-1]
    assert not any("CPU" in line for line in lines)
    assert conclusions(found, ["full:3"])[0].startswith("Not finished")


def test_what_cannot_be_shown_is_said_first(report: Callable[..., Report]) -> None:
    found = report(articles=20, seeds=2, device="cpu", energy_joules=None)
    lines = conclusions(found, missing=["full:2"])
    assert lines[0].startswith(
        "Too small to conclude: there are 20 test articles, and it takes 200; 2 seeds an arm"
    )
    assert lines[1] == "Of the runs 1 is missing, failed or yet to be run: full:2."
    assert all("(too small to conclude)" in line for line in lines if "against full" in line)
    assert any("On a CPU, memory" in line for line in lines)
    assert not any("energy." in line for line in lines[:-2] if "took" in line)


def test_arms_of_several_machines_are_not_timed_against_each_other(
    part: Callable[..., Part], report: Callable[..., Report]
) -> None:
    found, articles = report(articles=20, seeds=1), articles_of(20)
    nf4 = {"dtype": "bfloat16", "nf4": True}
    where = {
        "full": {},
        "lora-all": {
            "device": "cpu",
            "device_name": "CPU",
            "made_from": {**nf4, "dtype": "float32"},
        },
        "lora-early": {"device_name": "a faster GPU", "made_from": nf4},
    }
    parts = [part(arm, 0, articles, **changes) for arm, changes in where.items()]
    made = gather(CompareConfig(), parts, None, articles, None, resamples=200)
    lines = conclusions(made | {"data": found["data"]})
    cost = next(line for line in lines if line.startswith("Training took, of what full took"))
    assert cost.endswith(
        "lora-all 2 % of the parameters; lora-early 2 % of the parameters, 0.50 times the peak memory."
    )
    alike = next(line for line in lines if line.startswith("The arms were not computed alike"))
    assert (
        "full in bfloat16 on GPU; lora-all in float32 with NF4 weights on CPU; lora-early in "
        "bfloat16 with NF4 weights on a faster GPU." in alike
    )
    assert alike.endswith("are compared only of arms that were timed on the same kind of device.")
    assert not any("not computed alike" in line for line in conclusions(found))


def test_a_single_control_pair_has_no_random_ones(report: Callable[..., Report]) -> None:
    nothing = alignment(0.1) | {"pairs": 1}
    for row in (*nothing["rows"], *nothing["linear_head"]):
        row["before"] = row["before"] | {"separation": None}
        row["tests"] = {"mrr": {"ci95": [None, None]}}
    nothing["layers"] = [{"layer": 0, "before": {"separation": None, "mrr": 1.0}} for _ in range(3)]
    for row in nothing["layers"]:
        row["after"] = row["before"]
    found = report(articles=20, seeds=1, alignment=nothing)
    found["conclusions"] = conclusions(found)
    line = next(c for c in found["conclusions"] if c.startswith("Retrieval of 1 unseen pair at"))
    assert "; after it: full 0.500, lora-all 0.500, " in line
    assert ". 1 pair cannot tell a change from noise, 20 might. A linear head" in line
    page = report_html(plain_json(found))
    assert "<td>\u2013 → 0.300</td>" in page
    # the change's interval below, where there is one
    assert "0.400 → 0.500<small>\u2013</small></td>" in page
    assert "0.400 → 0.500<small>0.050 to 0.150</small></td>" in report_html(
        plain_json(report(articles=20, seeds=1) | {"conclusions": ["-"]})
    )


def test_one_article_and_nothing_to_test(part: Callable[..., Part]) -> None:
    articles = articles_of(1)
    found = gather(CompareConfig(), [part("joint", 0, articles)], None, articles, None)
    assert found["tests"] == []
    assert math.isnan(found["arms"][0]["text"]["bleu"]["ci95"][0])
    json.dumps(plain_json(found), allow_nan=False)


def test_a_chart_is_xml_and_holds_its_points() -> None:
    nan = float("nan")
    svg = chart(
        [
            Series("a <b>", 0, [(0, 1.0), (10, 3.5), (nan, 2)]),
            Series("dots", 1, [(5, 2.0)], "big", [(1.5, 2.5)]),
            Series("none", 2, [(5, 2.0)], "dots", [(nan, nan)]),
        ],
        "step",
        "loss",
    )
    root = ET.fromstring(svg)
    line = root.find("polyline")
    assert line is not None
    points = [tuple(map(float, p.split(","))) for p in line.attrib["points"].split()]
    assert len(points) == 2
    assert points[0][0] < points[1][0]
    # upwards is less
    assert points[0][1] > points[1][1]
    assert len(root.findall("circle")) == 2
    assert len([e for e in root.findall("line") if "bar" in e.attrib["class"]]) == 1
    marks = [
        float(e.text or "") for e in root.findall("text") if "axis" not in e.attrib.get("class", "")
    ]
    assert {1.0, 2.0, 3.0, 0.0, 10.0} <= {*marks}
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
    assert chart([Series("a", 0, [])], "x", "y") == "<p>Nothing was measured.</p>"


@pytest.mark.parametrize("values", [[3, 3], [0, 0], [-1e-7, 2e-7], [1e6, 3e6], [0.9999, 1.0]])
def test_axes_reach_their_values(values: list[float]) -> None:
    root = ET.fromstring(chart([Series("a", 0, [(v, v) for v in values])], "x", "y"))
    marks = [e.text or "" for e in root.findall("text") if e.attrib.get("text-anchor") == "end"]
    numbers = [float(m.replace(",", "")) for m in marks]
    assert 2 <= len(numbers) <= 8
    assert len({*numbers}) == len(numbers)
    assert numbers[0] <= min(values) + 1e-12
    assert numbers[-1] >= max(values) - 1e-12


def test_the_page_escapes_and_warns(report: Callable[..., Report]) -> None:
    found = report(articles=20)
    found["conclusions"] = conclusions(found)
    page = report_html(plain_json(found))
    assert "&lt;tiny&gt; &amp; small" in page
    assert "<tiny>" not in page
    assert "the best step was chosen on" in " ".join(page.split())
    assert 'class="conclusions small"' in page
    # the header is YAML, whatever the model's folder is called
    found["data"]["base_model"] = 'a: "<b>" # c'
    header = yaml.safe_load(report_card(plain_json(found)).split("---\n")[1])
    assert header["base_model"] == 'a: "<b>" # c'


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_the_page(
    report: Callable[..., Report], tmp_path: Path, width: int
) -> None:
    found = report(articles=20)
    found["conclusions"] = conclusions(found)
    page = report_html(plain_json(found))
    # in a frame of a phone's width: a headless window has a least width of its own
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<meta charset="utf-8"><iframe width="{width}" height="800" style="border:0" '
        f'srcdoc="{html.escape(page)}"></iframe><pre id="found"></pre><script>'
        "onload = () => { const d = document.querySelector('iframe').contentDocument;"
        "document.querySelector('#found').textContent = JSON.stringify({"
        "wide: d.documentElement.scrollWidth, tables: d.querySelectorAll('table').length,"
        "drawn: [...d.querySelectorAll('svg')].map(s => s.getBoundingClientRect().width > 200),"
        "first: d.querySelector('#conclusions p').textContent}) }</script>",
        encoding="utf-8",
    )
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,900"]
    result = subprocess.run(
        [str(CHROMIUM), *options, "--dump-dom", frame.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in result.stderr
    match = re.search(r'<pre id="found">(.*?)</pre>', result.stdout)
    assert match is not None
    shown = json.loads(html.unescape(match[1]))
    assert shown["wide"] <= width
    assert shown["tables"] == 4
    assert shown["drawn"] == [True] * 6
    assert shown["first"].startswith("Too small to conclude")


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)")
@pytest.mark.parametrize(("scheme", "number"), [("light", 1), ("dark", 0)])
def test_a_screenshot_in_either_scheme(
    report: Callable[..., Report], tmp_path: Path, scheme: str, number: int
) -> None:
    """The page's own colours: what most pixels are, and text and charts that stand out from it."""
    found = report()
    found["conclusions"] = conclusions(found)
    page, picture = tmp_path / "report.html", tmp_path / "report.png"
    page.write_text(report_html(plain_json(found)), encoding="utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,2600"]
    options += [f"--blink-settings=preferredColorScheme={number}", f"--screenshot={picture}"]
    result = subprocess.run(
        [str(CHROMIUM), *options, page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in result.stderr
    pixels = imread(picture)[..., :3]
    assert pixels.shape[1] == 1200
    brightness = pixels.mean(-1)
    assert (np.median(brightness) > 0.9) == (scheme == "light")
    assert (np.median(brightness) < 0.2) == (scheme == "dark")
    apart = np.abs(brightness - np.median(brightness)) > 0.5
    assert 0.005 < apart.mean() < 0.3


def test_times_are_of_the_runs_that_had_the_device_to_themselves(part: Callable[..., Part]) -> None:
    tested = articles_of(20)
    settings = CompareConfig(arms=("full",), seeds=(0, 1))
    shared = part("full", 0, tested, side_by_side=4, wall_seconds=500.0, energy_joules=None)
    alone = part("full", 1, tested, wall_seconds=60.0)
    (arm,) = gather(settings, [shared, alone], None, tested, None, resamples=100)["arms"]
    assert (arm["wall_seconds"], arm["energy_joules"]) == (60.0, 50.0)
    assert (arm["timed_seeds"], arm["side_by_side"]) == ([1], 1)
    # quality is of all seeds
    assert len(arm["text"]["rougeL"]["by_seed"]) == 2
    (arm,) = gather(settings, [shared], None, tested, None, resamples=100)["arms"]
    assert (arm["wall_seconds"], arm["timed_seeds"], arm["side_by_side"]) == (500.0, [0], 4)


def test_rates_at_an_end_of_those_tried_are_said(report: Callable[..., Report]) -> None:
    losses = {"full": {1e-4: 3.1, 1e-5: 2.7, 3e-5: 2.8}, "joint": {1e-3: 2.6, 1e-4: 2.9, 1e-2: 3.0}}
    tried = [
        {"arm": arm, "learning_rate": rate, "seed": 0, "loss": loss, "step": 16}
        for arm, of_arm in losses.items()
        for rate, loss in of_arm.items()
    ]
    said = " ".join(conclusions(report() | {"rates": tried}))
    assert (
        "with seed 0: full 1e-05 (1e-05: 2.700, 3e-05: 2.800, 0.0001: 3.100); joint 0.001 (" in said
    )
    assert "The rate of full is at an end" in said
    assert "at an end" not in " ".join(conclusions(report()))
