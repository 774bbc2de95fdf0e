"""evaluate on a finished run of a tiny model: layers, strengths, texts, and what it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tli_engine.cli import main
from tli_engine.evaluate.bits_per_byte import bits_per_byte
from tli_engine.models.early import load_early
from tli_engine.models.files import open_model
from tli_engine.models.peft_format import load_adapter

Cli = Callable[..., Any]
Tree = Callable[[Path], dict[str, bytes | None]]
Report = dict[str, Any]

SIDE = {"p_at_1", "mrr", "csls_p_at_1"}
STAGE = {"cosine_true", "cosine_random", "separation", "reverse", *SIDE}
ROW = {"layer", "pooling", "presentation", "score", "split", "before", "after", "tests"}
TESTS = {"t_p", "wilcoxon_p", "effect_size", "ci95"}
TEXTS = {"a.txt": "Maji ni uhai.\n\nMoto si maji.\n", "b.txt": "ŋala 水\n"}
SINGLE = "model.safetensors"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    for name, text in TEXTS.items():
        (folder / name).write_text(text, encoding="utf-8")
    return {name: folder / name for name in TEXTS}


@pytest.fixture(scope="module")
def evaluated(
    trained: Path, texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run measured in full, at two strengths; not to be written to."""
    run = Path(shutil.copytree(trained, tmp_path_factory.mktemp("evaluated") / "run"))
    options = [o for path in texts.values() for o in ("--text", str(path))]
    assert main(["evaluate", str(run), "--strength", "0.5,1.0", *options]) == 0
    return run


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn and how well the baseline fits is tested elsewhere, and takes the time."""
    monkeypatch.setattr("tli_engine.evaluate.linear_head._STEPS", 2)
    for plot in ("plot_histograms", "plot_layer_curve"):
        monkeypatch.setattr(
            f"tli_engine.cli._evaluate.{plot}", lambda *args: args[-1].write_bytes(b"drawn")
        )


def report_of(run: Path) -> Report:
    found: Report = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    return found


def rows_of(report: Report, **wanted: Any) -> list[Report]:
    return [r for r in report["alignment"] if all(r[key] == v for key, v in wanted.items())]


def refused(cli: Cli, *args: object) -> str:
    """The one line on stderr of a command that ends with status 2."""
    status, out, err = cli(*args)
    assert (status, out) == (2, ""), err
    (line,) = err.splitlines()
    assert line.startswith("tli-engine: error: ")
    return str(line)


def test_report_holds_what_the_contract_says(evaluated: Path, texts: dict[str, Path]) -> None:
    report = report_of(evaluated)
    assert report.keys() >= {"alignment", "baselines", "bits_per_byte", "memory"}
    rows, heads = report["alignment"], report["baselines"]["linear_head"]
    for row in rows + heads:
        assert row.keys() >= ROW
        assert (row["pooling"], row["presentation"]) == ("content", "bare")
        for stage in (row["before"], row["after"]):
            assert stage.keys() >= STAGE
            assert stage["reverse"].keys() >= SIDE
            assert stage["separation"] == pytest.approx(
                stage["cosine_true"] - stage["cosine_random"]
            )
        assert row["tests"].keys() >= TESTS
        assert row["pairs"] == {"train": 10, "control": 4}[row["split"]]
    # every combination once: the training layer and the final one, of three blocks
    keys = [(r["layer"], r["strength"], r["score"], r["split"]) for r in rows]
    assert len(set(keys)) == len(keys)
    assert set(keys) == {
        (layer, strength, score, split)
        for layer in (2, 3)
        for strength in (0.5, 1.0)
        for score in ("cosine", "centred", "whitened")
        for split in ("train", "control")
    }
    assert [(r["layer"], r["split"]) for r in heads] == [
        (layer, split) for layer in (2, 3) for split in ("train", "control")
    ]
    assert set(report["bits_per_byte"]) == {str(path) for path in texts.values()}
    for cost in report["bits_per_byte"].values():
        assert cost.keys() >= {"before", "after"}
    assert report["memory"]["peak_mib"] > 0


def test_before_is_the_base_model_whatever_the_strength(
    evaluated: Path, cli: Cli, tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    report = report_of(evaluated)
    for row in rows_of(report, strength=0.5):
        same = {key: row[key] for key in ("layer", "score", "split")}
        (other,) = rows_of(report, strength=1.0, **same)
        assert row["before"] == other["before"]
        assert row["after"] != other["after"]
    # as a scan sees it, at the final layer too
    control = "swahili,english\nbarabara,road\nmvua,rain\nmlango,door\nkisu,knife\n"
    (tmp_path / "control.csv").write_text(control)
    assert cli("scan", tiny_model, "--pairs", "control.csv", "--out", "scan").status == 0
    scanned = json.loads(Path("scan/scan.json").read_text())["layers"]
    for layer in (2, 3):
        wanted = {"layer": layer, "score": "cosine", "split": "control", "strength": 1.0}
        (row,) = rows_of(report, **wanted)
        assert row["before"]["mrr"] == scanned[layer]["mrr"]
        assert row["before"]["cosine_true"] == pytest.approx(
            scanned[layer]["cosine_true"], abs=1e-6
        )
        assert row["before"]["cosine_random"] == pytest.approx(
            scanned[layer]["cosine_random"], abs=1e-6
        )


def test_the_linear_head_is_fitted_to_the_frozen_model(evaluated: Path) -> None:
    report = report_of(evaluated)
    for head in report["baselines"]["linear_head"]:
        wanted = {"score": "cosine", "split": head["split"], "strength": 1.0}
        (row,) = rows_of(report, layer=head["layer"], **wanted)
        assert head["before"] == row["before"]
        assert head["after"] != row["after"]


def test_bits_per_byte_are_those_of_base_and_adapted_model(
    evaluated: Path, tiny_model: Path, texts: dict[str, Path]
) -> None:
    files = open_model(str(tiny_model))
    model = load_early(files, 3, dtype=torch.float32, device=torch.device("cpu"))
    head = files.source.read("lm_head.weight")
    found = report_of(evaluated)["bits_per_byte"]
    for stage in ("before", "after"):
        if stage == "after":
            load_adapter(model, evaluated / "adapter")
        for name, path in texts.items():
            lines = [line for line in TEXTS[name].splitlines() if line]
            expected = bits_per_byte(model, files.tokenizer, head, lines)
            assert found[str(path)][stage] == pytest.approx(expected, rel=1e-6)
    for cost in found.values():
        assert set(cost["after_by_strength"]) == {"0.5", "1.0"}
        assert cost["after_by_strength"]["1.0"] == cost["after"]
        assert len({cost["before"], *cost["after_by_strength"].values()}) == 3


def test_plots_are_written(evaluated: Path, trained: Path) -> None:
    for name in ("alignment.png", "layers.png"):
        assert (evaluated / name).read_bytes().startswith(b"\x89PNG\r\n")
    assert not (trained / "layers.png").exists()


def test_the_rest_of_the_run_is_left_alone(evaluated: Path, trained: Path, tree: Tree) -> None:
    before, after = tree(trained), tree(evaluated)
    changed = {name for name in after if after[name] != before.get(name)}
    assert {"evaluation.json", "layers.png"} <= changed
    assert changed <= {"evaluation.json", "alignment.png", "layers.png"}
    assert not before.keys() - after.keys()


def test_what_is_printed(run: Path, texts: dict[str, Path], cli: Cli) -> None:
    result = cli("evaluate", run, "--strength", "0.5", "--text", texts["a.txt"])
    assert result.status == 0, result.err
    for layer in (2, 3):
        assert f"hidden_states[{layer}], content pooling: before → after training" in result.out
    assert result.out.count("the baseline to beat: the frozen model → a linear head on it") == 2
    assert result.out.count("strength 0.5") == 13
    assert "control (4)" in result.out
    (cost,) = [line for line in result.out.splitlines() if line.startswith(str(texts["a.txt"]))]
    bits = report_of(run)["bits_per_byte"][str(texts["a.txt"])]
    change = bits["after"] / bits["before"] - 1
    assert cost == (
        f"{texts['a.txt']}: {bits['before']:.4f} → {bits['after']:.4f} bits per byte "
        f"({change:+.1%}) at strength 0.5"
    )
    assert f"run folder: {run}" in result.err


def test_strength_nought_is_the_base_model(run: Path, texts: dict[str, Path], cli: Cli) -> None:
    options = ["--strength", "0", "--text", texts["a.txt"], "--no-final-layer"]
    assert cli("evaluate", run, *options).status == 0
    report = report_of(run)
    assert len(report["alignment"]) == 6
    for row in report["alignment"]:
        assert row["before"] == row["after"]
        assert row["tests"]["ci95"] == [0, 0]
        # no number, and JSON has no other word for it
        assert row["tests"]["t_p"] is None
    (cost,) = report["bits_per_byte"].values()
    assert cost["after"] == pytest.approx(cost["before"], rel=1e-6)


def with_model(run: Path, model: Path) -> None:
    """Make a run's configuration name another folder."""
    values = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    values["model"] = str(model)
    (run / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")


def spoilt(model: Path, folder: Path, *prefixes: str) -> Path:
    """A copy of the model without the tensors whose names begin so."""
    shutil.copytree(model, folder)
    tensors = load_file(model / SINGLE)
    kept = {n: t for n, t in tensors.items() if not n.startswith(prefixes)}
    assert len(kept) < len(tensors)
    save_file(kept, folder / SINGLE, metadata={"format": "pt"})
    return folder


def test_no_final_layer_needs_no_upper_block(
    run: Path, tiny_model: Path, evaluated: Path, cli: Cli, tmp_path: Path, tree: Tree
) -> None:
    lower = spoilt(tiny_model, tmp_path / "lower", "model.layers.2.", "model.norm", "lm_head")
    with_model(run, lower)
    result = cli("evaluate", run, "--no-final-layer")
    assert result.status == 0, result.err
    report = report_of(run)
    assert {row["layer"] for row in report["alignment"]} == {2}
    assert {row["layer"] for row in report["baselines"]["linear_head"]} == {2}
    assert "bits_per_byte" not in report
    assert not (run / "layers.png").exists()
    assert report["alignment"] == rows_of(report_of(evaluated), layer=2, strength=1.0)

    before = tree(run)
    assert f"{lower}: has no tensor layers.2." in refused(cli, "evaluate", run)
    assert tree(run) == before


def test_text_without_the_final_layer_takes_the_whole_model(
    run: Path, texts: dict[str, Path], evaluated: Path, cli: Cli
) -> None:
    assert cli("evaluate", run, "--no-final-layer", "--text", texts["b.txt"]).status == 0
    report = report_of(run)
    assert {row["layer"] for row in report["alignment"]} == {2}
    key = str(texts["b.txt"])
    expected = report_of(evaluated)["bits_per_byte"][key]
    assert report["bits_per_byte"][key]["before"] == pytest.approx(expected["before"], rel=1e-6)
    assert report["bits_per_byte"][key]["after"] == pytest.approx(expected["after"], rel=1e-6)


def test_text_needs_the_output_embeddings(
    run: Path, tiny_model: Path, texts: dict[str, Path], cli: Cli, tmp_path: Path
) -> None:
    headless = spoilt(tiny_model, tmp_path / "headless", "lm_head")
    with_model(run, headless)
    line = refused(cli, "evaluate", run, "--text", texts["a.txt"])
    assert f"{headless}: has no tensor lm_head.weight" in line


def test_warnings_of_training_are_kept(run: Path, cli: Cli) -> None:
    report = report_of(run)
    report["warnings"] = ["the loss collapsed"]
    (run / "evaluation.json").write_text(json.dumps(report))
    for _ in range(2):
        assert cli("evaluate", run, "--no-final-layer").status == 0
    assert report_of(run)["warnings"] == ["the loss collapsed"]


def test_a_run_without_control_pairs(run: Path, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("swahili,english\nmaji,water\nmoto,fire\nmti,tree\n")
    values = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    values["data"]["pairs"] = "pairs.csv"
    (run / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    result = cli("evaluate", run)
    assert result.status == 0, result.err
    assert "warning: no control pairs" in result.err
    assert "the train pairs are not those of the run any more" in result.err
    assert {row["split"] for row in report_of(run)["alignment"]} == {"train"}


def test_one_control_pair(run: Path, cli: Cli, tmp_path: Path) -> None:
    """Nothing can be said of its mismatched pairs, and everything else can."""
    (tmp_path / "control.csv").write_text("swahili,english\nkisu,knife\n")
    (tmp_path / "train.csv").write_text("swahili,english\nmaji,water\nmoto,fire\nmti,tree\n")
    values = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    values["data"] |= {"pairs": "train.csv", "control": "control.csv"}
    (run / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    result = cli("evaluate", run)
    assert result.status == 0, result.err
    (row,) = rows_of(report_of(run), layer=2, split="control", score="cosine")
    assert row["pairs"] == 1
    assert -1 <= row["after"]["cosine_true"] <= 1
    assert row["after"]["cosine_random"] is None
    assert row["tests"]["t_p"] is None
    assert "]: 1 pair cannot tell a change from noise, 20 might; chance 1.000" in result.out


ERRORS = [
    pytest.param(["none"], "none: not a run folder; it has no config.yaml", id="no-run"),
    pytest.param(["{tmp}"], "not a run folder; it has no config.yaml", id="no-run-folder"),
    *(
        pytest.param(["{run}", f"--strength={s}"], f"--strength {s}: must be", id=f"strength-{s}")
        for s in ("", "a", "1,", "0.5;1", "1.0,nan", "inf", "-inf")
    ),
    pytest.param(
        ["{run}", "--text", "none.txt"], "none.txt: cannot be read: No such", id="no-text"
    ),
    pytest.param(["{run}", "--text", "{tmp}"], "{tmp}: cannot be read", id="text-is-a-folder"),
    pytest.param(["{run}", "--text", "latin.txt"], "latin.txt: not UTF-8", id="not-utf-8"),
    pytest.param(["{run}", "--text", "blank.txt"], "blank.txt: has no text", id="blank-text"),
    pytest.param(
        ["{run}", "--text", "good.txt", "--text", "none.txt"], "none.txt: cannot", id="second-text"
    ),
    pytest.param(["{run}", "--device", "tpu"], "device: 'tpu'", id="device"),
]


@pytest.mark.parametrize(("args", "message"), ERRORS)
def test_mistakes_are_refused_before_anything_is_done(
    args: list[str],
    message: str,
    run: Path,
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tree: Tree,
) -> None:
    def load(*args: object, **options: object) -> None:
        pytest.fail("the model was loaded first")

    monkeypatch.setattr("tli_engine.cli._evaluate.load_early", load)
    (tmp_path / "latin.txt").write_bytes("ŋala".encode("utf-16"))
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "good.txt").write_text("maji\n")
    before = tree(tmp_path)
    names = {"run": run, "tmp": tmp_path}
    line = refused(cli, "evaluate", *(arg.format(**names) for arg in args))
    assert message.format(**names) in line
    assert tree(tmp_path) == before


def test_an_unfinished_run_says_how_to_finish_it(run: Path, cli: Cli, tree: Tree) -> None:
    shutil.rmtree(run / "adapter")
    before = tree(run)
    line = refused(cli, "evaluate", run)
    assert (
        f"{run}: has no adapter yet; finish it with tli-engine train --resume --run {run}" in line
    )
    assert tree(run) == before


@pytest.mark.parametrize("what", ["model", "pairs"])
def test_what_the_run_was_made_of_is_gone(what: str, run: Path, cli: Cli, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    values = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    if what == "model":
        values["model"] = str(gone)
    else:
        values["data"]["pairs"] = f"{gone}.csv"
    (run / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    assert str(gone) in refused(cli, "evaluate", run)


def test_another_base_model_is_refused(run: Path, cli: Cli, tmp_path: Path, tree: Tree) -> None:
    """No silent fall-back to the base model."""
    from tli_engine.testing import save_tiny_model

    other = save_tiny_model(tmp_path / "other", "llama", hidden_size=64)
    with_model(run, other)
    before = tree(run)
    line = refused(cli, "evaluate", run, "--no-final-layer")
    assert f"{other}: its weights are not those that {run} was trained on" in line
    assert tree(run) == before
