"""Runs of a comparison made one at a time, side by side, or within a budget, and what is refused first."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tli_engine.cli import _compare
from tli_engine.cli._compare_made import held_in_nf4
from tli_engine.config import resolve_config
from tli_engine.models.files import open_model

Cli = Callable[..., Any]


def test_runs_made_apart_are_gathered(cli: Cli, config: Path, tmp_path: Path) -> None:
    options = ("--set", "compare.keep_weights=false")
    assert cli("compare", config, "--out", "a", "--only", "lora-early:5", *options).status == 0
    assert not (tmp_path / "a/report.json").exists()
    left = {p.name for p in (tmp_path / "a/lora-early-5").iterdir()}
    assert {"adapter", "checkpoints", "best"} & left == set()
    assert left >= {"result.json", "predictions.jsonl", "metrics.jsonl", "config.yaml"}
    # one that was killed before it had removed its weights
    (tmp_path / "a/lora-early-5/adapter").mkdir()
    assert cli("compare", config, "--out", "a", "--only", "lora-early:5", *options).status == 0
    assert not (tmp_path / "a/lora-early-5/adapter").exists()
    # an earlier version did not say what it was made from, nor does every machine have the same one
    path = tmp_path / "a/lora-early-5/result.json"
    result = json.loads(path.read_text())
    del result["made_from"]
    result["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(result))
    # which is said where they are gathered, not by each run as well
    base = cli("compare", config, "--out", "a", "--only", "base", *options)
    assert base.status == 0
    assert "earlier version" not in base.err
    gathered = cli("compare", config, "--out", "a", "--gather", *options)
    assert gathered.status == 0
    assert gathered.err.count("lora-early-5: an earlier version made it, which did not record") == 1
    report = json.loads((tmp_path / "a/report.json").read_text())
    assert [arm["name"] for arm in report["arms"]] == ["lora-early"]
    # the base model's summaries are scored, too
    assert report["versions"]["torch"] == f"1.0 and {torch.__version__}"
    # on another machine files lie elsewhere
    moved = tmp_path / "moved"
    shutil.copytree(config.parent, moved)
    text = (moved / "compare.yaml").read_text().replace(str(config.parent), str(moved))
    (moved / "compare.yaml").write_text(text)
    assert cli("compare", moved / "compare.yaml", "--out", "a", "--gather", *options).status == 0
    # other articles are not these
    result = json.loads((tmp_path / "a/lora-early-5/result.json").read_text())
    result["test"]["sha256"] = "0"
    (tmp_path / "a/lora-early-5/result.json").write_text(json.dumps(result))
    result = cli("compare", config, "--out", "a", "--gather", *options)
    assert result.status == 2
    assert "tested on other articles" in result.err


@pytest.mark.parametrize(
    ("stored", "quantize", "held"),
    [(True, "auto", True), (True, "none", False), (False, "auto", False), (False, "nf4", True)],
)
def test_weights_in_nf4_are_known_however_they_came_to_be(
    tiny_model: Path, tmp_path: Path, stored: bool, quantize: str, held: bool
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    values = json.loads((folder / "config.json").read_text())
    kind = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    values |= {"quantization_config": kind} if stored else {}
    (folder / "config.json").write_text(json.dumps(values))
    run = resolve_config({"model": "tiny", "quantize": quantize}, "test")
    assert held_in_nf4(run, open_model(str(folder))) is held


def test_several_that_are_asked_for_run_apart(
    cli: Cli, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one process the second one's peak of memory would be the first one's."""
    ran: list[list[str]] = []
    monkeypatch.setattr(
        _compare,
        "_in_processes",
        lambda c, parts, jobs: ran.append(parts) or dict.fromkeys(parts, 0),
    )
    wanted = [word for part in ("full:5", "base") for word in ("--only", part)]
    assert cli("compare", config, "--out", "o", *wanted).status == 0
    assert ran == [["full:5"], ["base"]]
    assert not (tmp_path / "o/report.json").exists()


def test_side_by_side(cli: Cli, config: Path, tmp_path: Path) -> None:
    arms = ("--set", "compare.arms=[full, lora-early]")
    wanted = [word for part in ("full:5", "lora-early:5") for word in ("--only", part)]
    assert cli("compare", config, "--out", "s", *arms, "--jobs", "2", *wanted).status == 0
    # nothing is gathered where only some were asked for
    assert not (tmp_path / "s/report.json").exists()
    assert cli("compare", config, "--out", "s", *arms, "--gather").status == 0
    report = json.loads((tmp_path / "s/report.json").read_text())
    for arm in report["arms"]:
        assert (arm["side_by_side"], arm["timed_seeds"], arm["energy_joules"]) == (2, [5], None)
    (line,) = (c for c in report["conclusions"] if "side by side" in c)
    assert line.startswith("full and lora-early ran")


def test_a_budget_of_time(cli: Cli, config: Path, tmp_path: Path) -> None:
    changes = ("compare.arms=[tli-then-lora-early]", "compare.seconds=0.0001")
    options = [word for change in changes for word in ("--set", change)]
    result = cli("compare", config, "--out", "b", *options)
    assert result.status == 0, result.err
    steps = (tmp_path / "b/tli-then-lora-early-5/metrics.jsonl").read_text().splitlines()
    assert len(steps) == 1
    assert "validation_loss" in json.loads(steps[0])
    report = json.loads((tmp_path / "b/report.json").read_text())
    assert any("0.0001 s of training" in line for line in report["conclusions"])


def test_no_room_for_articles_is_found_before_training(
    cli: Cli, config: Path, tmp_path: Path
) -> None:
    options = ("--set", "compare.max_new_tokens=90", "--only", "full:5")
    result = cli("compare", config, "--out", "new", *options)
    assert result.status == 2
    assert "90 new tokens and 10 of the prompt leave no room for the article" in result.err
    assert not (tmp_path / "new/full-5").exists()


def test_summaries_that_figures_are_of_are_not_replaced(
    cli: Cli, config: Path, tmp_path: Path
) -> None:
    assert cli("compare", config, "--out", "e", "--only", "full:5").status == 0
    written = (tmp_path / "e/full-5/predictions.jsonl").read_bytes()
    result = cli("evaluate", "e/full-5", "--max-new-tokens", 2)
    assert result.status == 2
    assert "e/full-5: is a comparison's run" in result.err
    assert (tmp_path / "e/full-5/predictions.jsonl").read_bytes() == written
    # as the line says
    shutil.copytree(tmp_path / "e/full-5", "copy", ignore=shutil.ignore_patterns("result.json"))
    assert cli("evaluate", "copy", "--max-new-tokens", 2).status == 0


@pytest.mark.parametrize("key", ["texts", "validation"])
def test_articles_that_are_not_there_are_found_before_training(
    key: str, cli: Cli, config: Path, tmp_path: Path
) -> None:
    result = cli("compare", config, "--out", "n", "--set", f"data.{key}=none.jsonl")
    assert result.status == 2
    assert "none.jsonl: cannot be read: No such file" in result.err
    assert not (tmp_path / "n").exists()


def test_a_folder_of_something_else_is_left_alone(cli: Cli, config: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("")
    result = cli("compare", config, "--out", "other")
    assert result.status == 2
    assert "is no comparison's folder" in result.err
    # one that was killed as it began is its own
    (tmp_path / "other/thesis.txt").rename(tmp_path / "other/.compare.yaml.part")
    assert cli("compare", config, "--out", "other", "--only", "base").status == 0
