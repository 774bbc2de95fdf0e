"""``evaluate RUN --against OTHER``: two runs' summaries of the same articles, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]


@pytest.fixture
def both(cli: Cli, sft_config: Callable[..., Path]) -> None:
    """Two runs, ``run`` and ``other``; the other one is evaluated."""
    for run, seed in (("run", 0), ("other", 1)):
        assert cli("train", sft_config(seed=seed), "--run", run).status == 0
    assert cli("evaluate", "other", "--max-new-tokens", "6").status == 0


def refused(cli: Cli, *options: object) -> str:
    """The last line of an evaluation against ``other`` that ends with status 2."""
    result = cli("evaluate", "run", "--max-new-tokens", "6", "--against", "other", *options)
    assert result.status == 2
    assert not Path("run/predictions.jsonl").exists()
    return str(result.err.splitlines()[-1])


def found(run: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(Path(run, "evaluation.json").read_text())
    return values


@pytest.mark.usefixtures("both")
def test_one_run_against_another(cli: Cli) -> None:
    result = cli("evaluate", "run", "--max-new-tokens", "6", "--against", "other")
    assert result.status == 0, result.err
    assert "chrF++ against other: " in result.out
    assert "were not written alike" not in result.out
    against = found("run")["against"]
    assert (against["run"], against["decoding_differs"]) == ("other", {})
    assert against["tests"]["rougeL"].keys() == {"difference", "ci95", "p", "p_holm"}
    # what the next one will be held against
    record = found("run")["predictions"]
    assert record.keys() == {"sha256", "articles", "decoding"}
    assert (record["articles"]["count"], len(record["articles"]["sha256"])) == (2, 64)
    assert record["decoding"]["max_new_tokens"] == 6


@pytest.mark.usefixtures("both")
def test_other_articles_are_refused(cli: Cli) -> None:
    # as many as before, of the same name
    lines = Path("unseen.jsonl").read_text(encoding="utf-8").splitlines()
    Path("unseen.jsonl").write_text("\n".join(lines[::-1]) + "\n", encoding="utf-8")
    line = refused(cli)
    assert "--against other: its summaries are of other articles, 2 of " in line
    assert "unseen.jsonl; this run's are 2 of " in line


@pytest.mark.usefixtures("both")
def test_another_decoding_is_said_beside_the_tests(cli: Cli) -> None:
    result = cli("evaluate", "run", "--max-new-tokens", "4", "--beams", "2", "--against", "other")
    assert result.status == 0, result.err
    (line,) = [line for line in result.out.splitlines() if "were not written alike" in line]
    assert (
        "this run's with max_new_tokens 4, beams 2, other's with max_new_tokens 6, beams 1" in line
    )
    differing = found("run")["against"]["decoding_differs"]
    assert differing == {"max_new_tokens": [4, 6], "beams": [2, 1]}


@pytest.mark.usefixtures("both")
def test_files_that_do_not_say_what_they_are_of(cli: Cli) -> None:
    path = Path("other/predictions.jsonl")
    text = path.read_text(encoding="utf-8")
    path.write_text(text.splitlines(keepends=True)[0], encoding="utf-8")
    line = refused(cli)
    assert "other/predictions.jsonl: is not what was written with the figures beside it" in line
    path.write_text(text, encoding="utf-8")
    # as earlier versions left it
    report = Path("other/evaluation.json")
    values = found("other")
    del values["predictions"]
    report.write_text(json.dumps(values), encoding="utf-8")
    line = refused(cli)
    assert "--against other: does not say of which articles its summaries are" in line
    assert line.endswith("run tli-engine evaluate other again")
    path.unlink()
    report.unlink()
    assert "other/predictions.jsonl: no such file" in refused(cli)


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("run", ["other", "run"])
def test_damaged_figures_are_one_line(cli: Cli, run: str) -> None:
    """The other run's, and the run's own, which are kept beside what is measured."""
    report = Path(run, "evaluation.json")
    values = found("other")
    record = values["predictions"]
    articles = record["articles"]
    for damaged, reason in (
        ("{", "not JSON: Expecting property name"),
        ([values], "(top level): must be a section of keys (got [{'loss': "),
        (values | {"predictions": 1}, "predictions: must be a section of keys (got 1); "),
        (values | {"predictions": {}}, "predictions.sha256: is required; "),
        (
            values | {"predictions": record | {"articles": articles | {"count": "two"}}},
            "predictions.articles.count: input should be a valid integer (got 'two'); ",
        ),
        (
            values | {"predictions": record | {"decoding": None}},
            "predictions.decoding: input should be a valid dictionary (got None); ",
        ),
        (values | {"loss": 3.5}, "loss: must be a section of keys (got 3.5); "),
        (values | {"baselines": []}, "baselines: input should be a valid dictionary (got []); "),
        (values | {"warnings": ""}, "warnings: input should be a valid list (got ''); "),
    ):
        report.write_text(damaged if isinstance(damaged, str) else json.dumps(damaged))
        line = refused(cli)
        assert line.startswith(
            f"tli-engine: error: {run}/evaluation.json: cannot be read: {reason}"
        )
        assert line.endswith(f"; delete it and measure the run again, by evaluate {run}")
        assert len(line) < 400
