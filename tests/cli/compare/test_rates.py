"""Learning rates that a comparison chooses by the loss on unseen articles, and what it refuses."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tli_engine.config import read_yaml

Cli = Callable[..., Any]
RATES = ("--set", "compare.rates.lora-early=[1.0e-3,3.0e-2]")
ARMS = ("--set", "compare.arms=[lora-all,lora-early,tli-then-lora-early]")
TRIALS = "lora-early@0.001", "lora-early@0.03"


@pytest.fixture
def settings(config: Path) -> tuple[Path, tuple[str, ...]]:
    return config, (
        *RATES,
        *ARMS,
        "--set",
        "compare.set={tli: {train: {epochs: 1, batch_size: 4}}}",
    )


def test_the_rate_of_the_lowest_loss_is_taken(
    cli: Cli, settings: tuple[Path, tuple[str, ...]], tmp_path: Path
) -> None:
    config, options = settings
    assert cli("compare", config, "--out", "c", *options).status == 0
    folders = [tmp_path / "c/rates" / name.replace("@", "-") for name in TRIALS]
    tried = [json.loads((folder / "rate.json").read_text()) for folder in folders]
    best = min(tried, key=lambda trial: trial["loss"])["learning_rate"]
    for name in ("lora-early-5", "tli-then-lora-early-5"):
        assert read_yaml(tmp_path / "c" / name / "config.yaml")["train"]["learning_rate"] == best
    # of an arm without rates it is the configuration's, of word pairs, too
    for name in ("lora-all-5", "tli-5"):
        assert read_yaml(tmp_path / "c" / name / "config.yaml")["train"]["learning_rate"] == 1e-2
    # a trial leaves figures alone
    assert not any((folder / name).exists() for folder in folders for name in ("adapter", "best"))
    report = json.loads((tmp_path / "c/report.json").read_text())
    assert [(t["arm"], t["learning_rate"], t["seed"]) for t in report["rates"]] == [
        ("lora-early", 1e-3, 5),
        ("lora-early", 3e-2, 5),
    ]
    said = " ".join(report["conclusions"])
    losses = "0.001: {:.3f}, 0.03: {:.3f}".format(*(trial["loss"] for trial in tried))
    assert f"with seed 5: lora-early {best:g} ({losses})." in said
    # nothing is made again
    result = cli("compare", config, "--out", "c", *options, "--only", TRIALS[0])
    assert result.status == 0
    assert "is done" in result.err
    other = tried[0]["made_from"] | {"base_sha256": "0"}
    (folders[0] / "rate.json").write_text(json.dumps(tried[0] | {"made_from": other}))
    result = cli("compare", config, "--out", "c", *options, "--gather")
    assert result.status == 2
    assert "were made from another base model's weights" in result.err
    (folders[0] / "rate.json").write_text(json.dumps(tried[0] | {"loss": math.nan}))
    result = cli("compare", config, "--out", "c", *options, "--gather")
    assert result.status == 2
    assert "rate.json: cannot be read: loss" in result.err
    assert result.err.rstrip().endswith(f"by compare --only {TRIALS[0]}")


def test_an_arm_waits_for_its_rates(
    cli: Cli, settings: tuple[Path, tuple[str, ...]], tmp_path: Path
) -> None:
    config, options = settings
    assert cli("compare", config, "--out", "c", *options, "--only", TRIALS[1]).status == 0
    result = cli("compare", config, "--out", "c", *options, "--only", "lora-early:5")
    assert result.status == 2
    assert f"compare.rates: {TRIALS[0]} has not been tried" in result.err
    assert f"compare --only {TRIALS[0]} does" in result.err
    assert not (tmp_path / "c/lora-early-5").exists()
    # which is not that of an arm without
    assert cli("compare", config, "--out", "c", *options, "--only", "lora-all:5").status == 0


def test_a_rate_that_diverges_is_not_taken(cli: Cli, config: Path, tmp_path: Path) -> None:
    arms = ("--set", "compare.arms=[joint]", "--set", "compare.set={}")
    options = (*arms, "--set", "compare.rates.joint=[1.0e-3,1.0e+30]")
    result = cli("compare", config, "--out", "c", *options, "--only", "joint@1e+30")
    assert result.status == 0
    assert "joint@1e+30: is not taken: " in result.err
    assert cli("compare", config, "--out", "c", *options).status == 0
    report = json.loads((tmp_path / "c/report.json").read_text())
    assert [trial["loss"] is None for trial in report["rates"]] == [False, True]
    assert any(
        "joint 0.001 (0.001: " in s and "1e+30: not a number" in s for s in report["conclusions"]
    )
    # where nothing is left nothing is made
    options = (*arms, "--set", "compare.rates.joint=[1.0e+29,1.0e+30]")
    result = cli("compare", config, "--out", "d", *options)
    assert result.status == 2
    assert "compare.rates.joint: with none is the loss a number; give lower ones" in result.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["compare.rates.full=[1.0e-3,1.0e-4]"], "compare.set.full.train.learning_rate: is chosen of rates.full"),
        (["compare.rates.lora-all=[1.0e-3,1.0e-3]"], "compare.rates.lora-all must be different"),
        (["compare.rates.lora-all=[1.0e-3]"], "compare.rates.lora-all"),
        (["compare.rates.lora-all=[-1.0,1.0]"], "compare.rates.lora-all"),
        (["compare.rates.tli=[1.0,2.0]"], "compare.rates.tli"),
        (["compare.rates.tli-then-lora-early=[1.0,2.0]"], "takes that of lora-early; leave it out"),
        (["compare.rates.joint=[1.0,2.0]", "compare.arms=[full]"], "rates.joint: is none of the arms full"),
        (["compare.rates.joint=[1.0,2.0]", "data.test=null"], "data.test: compare.rates chooses by"),
    ],
)  # fmt: skip
def test_rates_that_cannot_be_chosen(
    options: list[str], message: str, cli: Cli, config: Path, tmp_path: Path
) -> None:
    given = [part for option in options for part in ("--set", option)]
    result = cli("compare", config, "--out", "c", *given)
    assert result.status == 2
    assert message in result.err
    assert not (tmp_path / "c").exists()
