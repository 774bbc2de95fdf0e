"""Files of a run of a comparison that are damaged: one line says what, where, and what to do."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.comparison import without_plots
from tli_engine.cli import main

Cli = Callable[..., Any]
PART = "lora-early:5"
AGAIN = f"delete it and make {PART} again, by compare --only {PART}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, config: Path, _one_thread: None) -> Path:
    """A comparison of which one run is done; not to be written to."""
    folder = tmp_path_factory.mktemp("damaged") / "out"
    with pytest.MonkeyPatch.context() as patch:
        without_plots(patch)
        assert main(["compare", str(config), "--out", str(folder), "--only", PART]) == 0
    return folder


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def changed(values: Any, path: str, value: Any) -> Any:
    """The values with one in them replaced, changed by a function, or left out if it is to be ``...``."""
    *keys, last = path.split()
    within = values
    for key in keys:
        within = within[int(key) if isinstance(within, list) else key]
    if value is ...:
        del within[last]
    else:
        within[last] = value(within[last]) if callable(value) else value
    return values


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("test", {}, "test.sha256: is required"),
        ("test", ..., "test: is required"),
        ("versions", [], "versions: input should be a valid dictionary (got [])"),
        ("versions torch", 2, "versions.torch: input should be a valid string (got 2)"),
        ("predictions", [], "predictions: must be a section of keys (got [])"),
        ("tokens_per_s", ..., "tokens_per_s: is required"),
        ("tokens_per_s", "fast", "tokens_per_s: input should be a valid number (got 'fast')"),
        ("wall_seconds", float("nan"), "wall_seconds: input should be a finite number (got nan)"),
        # what others' are held against
        ("peak_mib", 0, "peak_mib: input should be greater than 0 (got 0)"),
        ("loss after", ..., "loss.after: is required"),
        ("warnings", None, "warnings: input should be a valid list (got None)"),
        ("generation", "none", "generation: must be a section of keys (got 'none')"),
        ("alignment rows", [], "alignment: there is no row of split control and score centred"),
        ("alignment linear_head", [], "alignment: linear_head has no row of split control"),
        ("alignment layers 2 after mrr", ..., "alignment.layers.2.after.mrr: is required"),
        (
            "alignment rows 0 tests mrr ci95",
            [0.1],
            "alignment.rows.0.tests.mrr.ci95: list should have at least 2 items after validation, "
            "not 1 (got [0.1])",
        ),
        (
            "alignment rows",
            lambda rows: [row | {"tests": {"mrr": {"ci95": [0.1, None]}}} for row in rows],
            "alignment: the interval of 4 pairs has no ends",
        ),
        ("made_from", {}, "made_from: configs: is required"),
        ("made_from dtype", None, "made_from: dtype: input should be a valid string (got None)"),
        ("made_from configs", [{}, {}], "made_from: 2 of 1 configs"),
        ("made_from configs", [{}], "made_from.configs.0: model: is required"),
        (
            "made_from configs 0 lora",
            4,
            "made_from.configs.0: lora: must be a section of keys (got 4)",
        ),
    ],
)
def test_figures_that_lack_a_key_or_have_another_type(
    cli: Cli, config: Path, out: Path, path: str, value: Any, reason: str
) -> None:
    file = out / "lora-early-5/result.json"
    file.write_text(json.dumps(changed(json.loads(file.read_text()), path, value)))
    expected = f"tli-engine: error: {file}: cannot be read: {reason}; {AGAIN}\n"
    for how in (("--gather",), ("--only", PART), ("--only", "joint:5")):
        result = cli("compare", config, "--out", out, *how)
        assert (result.status, result.err) == (2, expected)
    assert not (out / "joint-5").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b'{"loss": 1'])
def test_figures_that_are_no_json(cli: Cli, config: Path, out: Path, content: bytes) -> None:
    file = out / "lora-early-5/result.json"
    file.write_bytes(content)
    result = cli("compare", config, "--out", out, "--gather")
    assert result.status == 2
    (line,) = result.err.splitlines()
    start = f"tli-engine: error: {file}: cannot be read: not JSON: "
    assert re.fullmatch(rf"{re.escape(start)}.+; {re.escape(AGAIN)}", line)
    # what it says to do is enough
    file.unlink()
    assert cli("compare", config, "--out", out, "--only", PART).status == 0
    assert cli("compare", config, "--out", out, "--gather").status == 0


def test_alignment_of_two_runs_measured_at_other_layers(cli: Cli, config: Path, out: Path) -> None:
    other = Path(shutil.copytree(out / "lora-early-5", out / "lora-early-6")) / "result.json"
    result = json.loads(other.read_text())
    result["made_from"]["configs"][0]["seed"] = 6
    result["alignment"]["layers"].pop()
    other.write_text(json.dumps(result))
    seeds = ("--set", "compare.seeds=[5, 6]")
    found = cli("compare", config, "--out", out, "--gather", *seeds)
    assert found.status == 2
    assert f"{other}: cannot be read: alignment: its layers, scores and splits are not" in found.err
    assert found.err.endswith("make lora-early:6 again, by compare --only lora-early:6\n")


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("throughput", ..., "throughput: is required"),
        ("throughput tokens_per_s", None, "throughput.tokens_per_s: input should be a valid"),
        ("loss", [], "loss: must be a section of keys (got [])"),
        ("warnings", 3, "warnings: input should be a valid list (got 3)"),
    ],
)
def test_what_training_recorded_for_them(
    cli: Cli, config: Path, out: Path, path: str, value: Any, reason: str
) -> None:
    """Of a run that was trained and killed before it was measured."""
    (out / "lora-early-5/result.json").unlink()
    file = out / "lora-early-5/evaluation.json"
    file.write_text(json.dumps(changed(json.loads(file.read_text()), path, value)))
    result = cli("compare", config, "--out", out, "--only", PART)
    assert result.status == 2
    line = result.err.splitlines()[-1]
    assert line.startswith(f"tli-engine: error: {file}: cannot be read: {reason}")
    move = f"; move {out / 'lora-early-5'} away and make {PART} again, by compare --only {PART}"
    assert line.endswith(move)
