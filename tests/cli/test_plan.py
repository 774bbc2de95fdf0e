"""``tli-engine plan`` and ``train --dry-run``: nothing is read but configuration, tokenizer and pairs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.models import config_of
from tli_engine.models.survey import Survey

RECIPES = Path(__file__).parents[2] / "tli_engine" / "recipes"
Cli = Callable[..., Any]
Tree = Callable[[Path], dict[str, bytes | None]]


def test_json_has_the_keys_of_the_contract(cli: Cli, config_file: Path) -> None:
    status, out, _ = cli("plan", config_file, "--device", "h100", "--json")
    assert status == 0
    plan = json.loads(out)
    assert plan["download_bytes"] == 0
    assert plan["disk_bytes"] > 0
    assert plan["step_seconds"] is None
    assert {"weights", "embeddings", "adapters", "optimizer"} <= plan["gpu_bytes"].keys()
    for parts in (plan["host_bytes"], plan["gpu_bytes"]):
        assert all(isinstance(size, int) and size > 0 for size in parts.values())
    assert any("h100" in note for note in plan["notes"])
    on_cpu = json.loads(cli("plan", config_file, "--device", "cpu", "--json").out)
    assert on_cpu["gpu_bytes"] == {}
    # fp32 in place of bf16
    assert on_cpu["host_bytes"]["weights"] == 2 * plan["gpu_bytes"]["weights"]


def test_dry_run_is_the_plan_and_writes_nothing(
    cli: Cli, config_file: Path, tmp_path: Path, tree: Tree
) -> None:
    planned = cli("plan", config_file)
    dry = cli("train", config_file, "--dry-run")
    assert (dry.status, dry.out) == (0, planned.out)
    assert "in all" in dry.out
    on_two = cli("train", config_file, "--gpus", 2, "--dry-run")
    assert (on_two.status, cli("plan", config_file, "--gpus", 2)) == (0, on_two)
    # named beside a configuration that leaves it open, too
    named = cli("plan", config_file, "--gpus", 2, "--device", "cpu", "--set", "device=auto")
    assert (named.status, named.err) == (0, on_two.err)
    assert named.out.startswith(on_two.out)
    assert tree(tmp_path) == {}
    status, _, err = cli("train", "--resume", "--run", "nowhere", "--dry-run")
    assert (status, err) == (
        2,
        "tli-engine: error: --resume goes with --run DIR, and --gpus, alone; the run has its configuration\n",
    )


def test_weights_are_not_looked_for(
    cli: Cli, tiny_model: Path, config_file: Path, tmp_path: Path
) -> None:
    """A folder with configuration and tokenizer alone will do; so does the built-in, which is not here."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in tiny_model.iterdir():
        if path.suffix == ".json":
            (bare / path.name).write_bytes(path.read_bytes())
    assert cli("plan", config_file, "--set", f"model={bare}").status == 0
    plan = json.loads(cli("plan", "--recipe", "demo", "--json").out)
    assert plan["download_bytes"] == 92_871_040
    # converted to fp32, beside what was downloaded
    assert plan["disk_bytes"] > 92_871_040 + 4 * 134_515_008
    assert any("no tokenizer" in note for note in plan["notes"])


@pytest.mark.parametrize(
    ("recipe", "shape"), [("xlsum-swahili", "llama-3-8b"), ("qwen2-72b-xlsum", "qwen2-72b")]
)
def test_recipes_of_summaries_are_planned(
    recipe: str, shape: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a Hub model's configuration; neither articles nor weights are asked for."""
    asked = []

    def on_the_hub(name: str) -> Survey:
        asked.append(name)
        return Survey(name, config_of(shape), None, missing=lambda names: (7, True))

    monkeypatch.setattr("tli_engine.cli._plan.survey", on_the_hub)
    result = cli("plan", "--recipe", recipe, "--device", "h100", "--json")
    assert result.status == 0, result.err
    plan = json.loads(result.out)
    assert plan["download_bytes"] == 7
    assert plan["gpu_bytes"]["weights_nf4"] > plan["gpu_bytes"]["adapters"]
    assert asked == [yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())["model"]]


def test_a_device_that_is_not_known_is_one_line(cli: Cli, config_file: Path) -> None:
    status, out, err = cli("plan", config_file, "--device", "abacus")
    assert (status, out) == (2, "")
    assert err.startswith("tli-engine: error: --device abacus: not known; there are cpu, h100")


def test_of_several_gpus_the_bytes_are_those_of_each(cli: Cli, config_file: Path) -> None:
    plans = [
        json.loads(cli("plan", config_file, "--device", "h100", "--gpus", n, "--json").out)
        for n in (1, 2)
    ]
    assert [plan["gpus"] for plan in plans] == [1, 2]
    # half of the pairs; the model and its adapters whole
    assert plans[1]["gpu_bytes"]["activations"] < plans[0]["gpu_bytes"]["activations"]
    for name in ("weights", "embeddings", "adapters"):
        assert plans[1]["gpu_bytes"][name] == plans[0]["gpu_bytes"][name]
    shown = cli("plan", config_file, "--device", "h100", "--gpus", 2)
    assert "each GPU" in shown.out
    status, _, err = cli("plan", config_file, "--device", "h100", "--gpus", 0)
    assert (status, "--gpus" in err) == (2, True)
    for memory in ("nan", "inf", "80"):
        result = cli("plan", config_file, "--device", "h100", "--memory", memory)
        assert (result.status, result.out) == (2, "")
        assert result.err.endswith(f"--memory {memory}: h100 has 79.2 GiB\n")
