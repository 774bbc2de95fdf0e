"""scan, train and evaluate from end to end, on a tiny random model."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from tli_engine import __version__
from tli_engine.config import resolve_config

Cli = Callable[..., Any]
Tree = Callable[[Path], dict[str, bytes | None]]

ALIGNMENT = {"cosine_true", "cosine_random", "separation", "p_at_1", "mrr", "csls_p_at_1"}
SIDE = {"p_at_1", "mrr", "csls_p_at_1"}


def interrupt(*args: object, **options: object) -> None:
    """What Ctrl-C does to whatever runs."""
    raise KeyboardInterrupt


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n")


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is most of the time that a scan of a tiny model takes."""
    monkeypatch.setattr("tli_engine.cli._scan.plot_scan", lambda scan, path: None)


def scan_of(cli: Cli, model: Path, pairs: Path, *options: object) -> dict[str, Any]:
    result = cli("scan", model, "--pairs", pairs, "--out", "scan", "--overwrite", *options)
    assert result.status == 0, result.err
    return json.loads(Path("scan/scan.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def test_scan_writes_what_the_contract_says(cli: Cli, tiny_model: Path, pairs_file: Path) -> None:
    found = scan_of(cli, tiny_model, pairs_file)
    assert found.keys() >= {
        "model", "layers", "pooling", "pairs", "proposed_layer", "warnings", "seconds"
    }  # fmt: skip
    assert (found["model"], found["pooling"], found["pairs"]) == (str(tiny_model), "content", 14)
    assert [row["layer"] for row in found["layers"]] == [0, 1, 2, 3]
    for row in found["layers"]:
        assert row.keys() >= {"layer", "reverse", *ALIGNMENT}
        assert row["reverse"].keys() >= SIDE
        assert -1 <= row["cosine_random"] <= 1
        assert row["separation"] == pytest.approx(row["cosine_true"] - row["cosine_random"])
        assert 1 / 14 <= row["mrr"] <= 1
    assert found["proposed_layer"] in (None, 1, 2, 3)
    assert bool(found["warnings"]) >= (found["proposed_layer"] is None)
    assert is_png(Path("scan/scan.png"))
    assert {p.name for p in Path("scan").iterdir()} == {"scan.json", "scan.csv", "scan.png"}

    with Path("scan/scan.csv").open(newline="") as f:
        rows = list(csv.DictReader(f))
    for row, expected in zip(rows, found["layers"], strict=True):
        assert int(row["layer"]) == expected["layer"]
        assert float(row["mrr"]) == expected["mrr"]
        assert float(row["reverse_mrr"]) == expected["reverse"]["mrr"]


@pytest.mark.usefixtures("without_plots")
def test_scan_of_fewer_layers_or_again_gives_the_same_figures(
    cli: Cli, tiny_model: Path, pairs_file: Path
) -> None:
    whole = scan_of(cli, tiny_model, pairs_file)["layers"]
    assert scan_of(cli, tiny_model, pairs_file)["layers"] == whole
    assert scan_of(cli, tiny_model, pairs_file, "--layers", 2)["layers"] == whole[:3]


@pytest.mark.usefixtures("without_plots")
def test_scan_options_change_what_is_measured(cli: Cli, tiny_model: Path, pairs_file: Path) -> None:
    template = ["--presentation", "template"]
    template += ["--template", "swahili=neno {word}", "--template", "english=word {word}"]
    options: list[list[str]] = [
        [],
        ["--pooling", "paper"],
        ["--pooling", "paper", "--prefix", "none"],
        ["--presentation", "leading-space"],
        template,
        ["--limit", "5"],
        ["--languages", "english,swahili"],
    ]
    found = [scan_of(cli, tiny_model, pairs_file, *o) for o in options]
    assert [f["pairs"] for f in found] == [14, 14, 14, 14, 14, 5, 14]
    layers = [f["layers"][2] for f in found]
    # whichever language comes first, a pair's cosine is the same
    assert layers[-1]["cosine_true"] == pytest.approx(layers[0]["cosine_true"])
    assert layers[-1]["mrr"] == layers[0]["reverse"]["mrr"]
    assert len({round(layer["cosine_true"], 6) for layer in layers[:-1]}) == len(options) - 1


def test_scan_without_out_writes_nothing(
    cli: Cli, tiny_model: Path, pairs_file: Path, tmp_path: Path, tree: Tree
) -> None:
    result = cli("scan", tiny_model, "--pairs", pairs_file)
    assert result.status == 0
    assert "14 pairs, content pooling" in result.out
    assert tree(tmp_path) == {}


def test_run_folder(trained: Path, config_file: Path) -> None:
    files = {str(p.relative_to(trained)) for p in trained.rglob("*") if p.is_file()}
    assert files >= {
        "config.yaml",
        "metrics.jsonl",
        "evaluation.json",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/README.md",
    }
    assert not [f for f in files if Path(f).name.startswith(".") or f.endswith((".part", ".bin"))]
    assert all(is_png(trained / f) for f in files if f.endswith(".png"))

    recorded = yaml.safe_load((trained / "config.yaml").read_text(encoding="utf-8"))
    record = recorded["provenance"]
    assert record["versions"]["tli-engine"] == __version__
    assert record["pairs"]["train"]["count"] == 10
    assert re.fullmatch("[0-9a-f]{64}", record["base_sha256"])
    # every default is written out, and what the file said is kept
    given = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    resolved = resolve_config(recorded, "config.yaml")
    chosen = {"device": "cpu", "dtype": "float32"}
    expected = resolve_config(given, "given").model_copy(update=chosen)
    assert resolved.model_copy(update={"provenance": None}) == expected
    assert recorded["align"]["temperature"] == resolved.align.temperature


def test_metrics_hold_one_object_a_step(trained: Path) -> None:
    lines = (trained / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    assert [s["step"] for s in steps] == [1, 2, 3, 4, 5, 6]
    assert [s["epoch"] for s in steps] == [1, 1, 1, 2, 2, 2]
    for step in steps:
        assert step.keys() >= {
            "step", "epoch", "loss", "lr", "grad_norm", "tokens_per_s", "peak_mib"
        }  # fmt: skip
        assert step["loss"] > 0
        assert step["grad_norm"] > 0
        assert step["peak_mib"] > 0
    assert steps[0]["lr"] == 1e-2
    assert steps[-1]["lr"] < steps[0]["lr"]


def test_adapter_is_in_pefts_format(trained: Path, tiny_model: Path) -> None:
    from peft import LoraConfig, PeftConfig

    values = json.loads((trained / "adapter/adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == str(tiny_model)
    config = PeftConfig.from_pretrained(trained / "adapter")
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha, config.layers_to_transform) == (4, 8, [0, 1])
    assert set(config.target_modules or ()) == {"q_proj", "v_proj"}

    tensors = load_file(trained / "adapter/adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 2
    for name, tensor in tensors.items():
        assert re.fullmatch(
            r"base_model\.model\.model\.layers\.[01]\.self_attn\.[qv]_proj\.lora_[AB]\.weight", name
        )
        # trained: B began at zero
        assert tensor.any()
    assert (trained / "adapter/README.md").read_text(encoding="utf-8").startswith("---\nbase_model")


def test_evaluation_holds_what_the_contract_says(trained: Path) -> None:
    report = json.loads((trained / "evaluation.json").read_text(encoding="utf-8"))
    rows, heads = report["alignment"], report["baselines"]["linear_head"]
    assert {r["split"] for r in heads} == {"train", "control"}
    assert {(r["score"], r["split"]) for r in rows} == {
        (score, split)
        for score in ("cosine", "centred", "whitened")
        for split in ("train", "control")
    }
    for row in [*rows, *heads]:
        assert (row["layer"], row["pooling"], row["presentation"]) == (2, "content", "bare")
        for stage in (row["before"], row["after"]):
            assert stage.keys() >= {*ALIGNMENT, "reverse"}
            assert stage["reverse"].keys() >= SIDE
        assert row["tests"].keys() >= {"t_p", "wilcoxon_p", "effect_size", "ci95"}
        assert row["tests"]["ci95"][0] <= row["tests"]["ci95"][1]
    trained_on = next(r for r in rows if (r["score"], r["split"]) == ("cosine", "train"))
    assert trained_on["after"]["separation"] > trained_on["before"]["separation"]


def test_before_training_is_what_a_scan_measures(
    trained: Path, cli: Cli, tiny_model: Path, tmp_path: Path
) -> None:
    rows = json.loads((trained / "evaluation.json").read_text(encoding="utf-8"))["alignment"]
    control = "swahili,english\nbarabara,road\nmvua,rain\nmlango,door\nkisu,knife\n"
    (tmp_path / "control.csv").write_text(control)
    layer = scan_of(cli, tiny_model, tmp_path / "control.csv")["layers"][2]
    before = next(r for r in rows if (r["score"], r["split"]) == ("cosine", "control"))["before"]
    assert before["mrr"] == layer["mrr"]
    assert before["cosine_true"] == pytest.approx(layer["cosine_true"], abs=1e-6)


def test_parts_of_a_batch_have_no_part_in_modules_and_a_line_says_so(
    cli: Cli, config_file: Path
) -> None:
    options = ("--set", "train.steps=1", "--set", "train.epochs=null", "--set")
    options = (*options, "train.chunk_tokens=9", "--run")
    line = "train.chunk_tokens has no part in this: transformers' modules encode each batch whole"
    on_modules = cli("train", config_file, *options, "modules")
    assert on_modules.status == 0, on_modules.err
    assert line in on_modules.out + on_modules.err
    on_ops = cli("train", config_file, *options, "ops", "--set", "train.engine=fused")
    assert on_ops.status == 0, on_ops.err
    assert line not in on_ops.out + on_ops.err


def test_the_engines_ops_train_a_run_like_the_modules(
    trained: Path, config_file: Path, cli: Cli
) -> None:
    run = ["--run", "fused", "--set", "train.engine=fused", "--set", "train.checkpoint_steps=2"]
    assert cli("train", config_file, *run).status == 0
    ours, theirs = (
        json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["alignment"]
        for folder in (Path("fused"), trained)
    )
    for row, expected in zip(ours, theirs, strict=True):
        for key in ("cosine_true", "cosine_random"):
            assert row["after"][key] == pytest.approx(expected["after"][key], abs=1e-3)
    result = cli("evaluate", "fused")
    assert result.status == 0, result.err


def test_evaluate_gives_the_numbers_of_the_end_of_training(run: Path, cli: Cli) -> None:
    report = run / "evaluation.json"
    trained = json.loads(report.read_text(encoding="utf-8"))
    report.unlink()
    result = cli("evaluate", run)
    assert result.status == 0, result.err
    assert "before → after training" in result.out
    again = json.loads(report.read_text(encoding="utf-8"))
    # it looks at more layers than the end of training does; where both look, they agree
    assert [row for row in again["alignment"] if row["layer"] == 2] == trained["alignment"]


def test_evaluate_says_when_the_pairs_have_changed(
    run: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    pairs = tmp_path / "pairs.csv"
    text = Path(values["data"]["pairs"]).read_text(encoding="utf-8")
    pairs.write_text(text.replace("maji,water", "maji,liquid"), encoding="utf-8")
    values["data"]["pairs"] = str(pairs)
    (run / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    monkeypatch.setattr("tli_engine.cli._evaluate.load_early", interrupt)
    warning = f"warning: {pairs}: the train pairs are not those of the run any more\n"
    assert cli("evaluate", run).err.startswith(warning)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter/adapter_config.json", None, "no adapter_config.json; not a PEFT adapter"),
        ("adapter/adapter_model.safetensors", None, "adapter_model.safetensors: cannot be read"),
        ("adapter/adapter_model.safetensors", b"short", "safetensors: cannot be read"),
        ("adapter/adapter_config.json", b"{}", "peft_type is None; only LORA is understood"),
        ("config.yaml", b"model: [", "config.yaml: line 1: not YAML"),
        ("config.yaml", b"modle: x", "config.yaml: "),
    ],
)
def test_evaluate_of_a_damaged_run(
    name: str, content: bytes | None, message: str, run: Path, cli: Cli, tree: Tree
) -> None:
    """No silent fall-back to the base model."""
    (run / name).unlink()
    if content is not None:
        (run / name).write_bytes(content)
    before = tree(run)
    status, _, err = cli("evaluate", run)
    (line,) = err.splitlines()
    assert (status, message in line) == (2, True), line
    assert tree(run) == before


def test_overwrite_replaces_a_run_with_an_equal_one(
    run: Path, cli: Cli, config_file: Path, tree: Tree
) -> None:
    (run / "stale.txt").write_text("of the earlier run")
    before = tree(run)
    assert cli("train", config_file, "--run", run).status == 2
    assert tree(run) == before
    assert cli("train", config_file, "--run", run, "--overwrite").status == 0
    after = tree(run)
    assert before.keys() - after.keys() == {"stale.txt"}
    # one seed, one adapter
    for name in ("adapter/adapter_model.safetensors", "adapter/README.md", "config.yaml"):
        assert after[name] == before[name], name


def test_a_run_gets_a_folder_of_its_own_and_says_what_it_lacks(
    cli: Cli, config_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "pairs.csv").write_text("swahili,english\nmaji,water\nmoto,fire\nmti,tree\n")
    options = ["--set", "data.pairs=pairs.csv", "--set", "train.steps=1"]
    result = cli("train", config_file, *options)
    assert result.status == 0, result.err
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"tiny-\d{8}-\d{6}", folder.name)
    assert f"run folder: runs/{folder.name}" in result.err
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1
    # without control pairs nothing tells learning from memory
    assert "warning: no control pairs: what was learnt cannot be told" in result.err
    rows = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["alignment"]
    assert {r["split"] for r in rows} == {"train"}


@pytest.mark.parametrize("place", ["read_run_pairs", "open_model", "load_early"])
def test_interrupted_before_training_leaves_nothing(
    place: str,
    cli: Cli,
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tree: Tree,
) -> None:
    monkeypatch.setattr(f"tli_engine.train.prepare.{place}", interrupt)
    status, out, err = cli("train", config_file, "--run", "deep/er/run")
    assert (status, out) == (130, "")
    assert err.splitlines()[-1] == "tli-engine: interrupted"
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("place", ["load_early", "alignment_rows"])
def test_interrupted_evaluation_leaves_the_run_alone(
    place: str, run: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, tree: Tree
) -> None:
    monkeypatch.setattr(f"tli_engine.cli._evaluate.{place}", interrupt)
    before = tree(run)
    assert cli("evaluate", run).status == 130
    assert tree(run) == before
