"""``tli-engine compare``: arms and seeds to one report, resumed run by run."""

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.comparison import ARTICLES, in_this_process, without_plots
from tests.interrupt import at_step
from tli_engine.cli import _compare, main
from tli_engine.evaluate.compare.config import ARMS
from tli_engine.train.manifest import sha256
from tli_engine.train.metrics import MetricsLog

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, config: Path, _one_thread: None) -> Path:
    """A comparison of all arms; not to be written to."""
    folder = tmp_path_factory.mktemp("comparisons") / "all"
    with pytest.MonkeyPatch.context() as patch:
        without_plots(patch)
        patch.setattr(_compare, "_in_processes", in_this_process)
        assert main(["compare", str(config), "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def out(compared: Path, tmp_path: Path) -> Path:
    """A copy of the comparison."""
    return Path(shutil.copytree(compared, tmp_path / "out"))


def test_a_report_of_all_arms(compared: Path) -> None:
    report = json.loads((compared / "report.json").read_text())
    assert [arm["name"] for arm in report["arms"]] == list(ARMS)
    keys = "method layers seeds trainable_parameters text alignment tokens_per_s peak_mib"
    for arm in report["arms"]:
        assert arm.keys() >= {*keys.split(), "wall_seconds", "energy_joules", "loss"}
        assert arm["seeds"] == [5]
        assert arm["text"].keys() >= {"bleu", "chrf", "rouge1", "rouge2", "rougeL", "rougeLsum"}
        assert arm["text"]["chrf"].keys() >= {"score", "ci95", "signature", "by_seed"}
        assert [row["layer"] for row in arm["alignment"]["layers"]] == [0, 1, 2, 3]
        assert arm["alignment"]["split"] == "control"
        # of the same frozen model, whatever the arm
        assert arm["alignment"]["linear_head"] == report["arms"][0]["alignment"]["linear_head"]
    arms = {arm["name"]: arm for arm in report["arms"]}
    assert [arms[n]["layers"] for n in ("full", "lora-all", "lora-early")] == ["all", "all", "0-1"]
    sizes = [arms[name]["trainable_parameters"] for name in ARMS[:3]]
    assert sizes == sorted(sizes, reverse=True)
    assert len({*sizes}) == 3
    # the arm that goes on from TLI has its steps' time too
    before, after = arms["tli-then-lora-early"], arms["lora-early"]
    assert before["trainable_parameters"] == after["trainable_parameters"]
    assert before["steps"] == after["steps"] == [3]
    tests = report["tests"]
    assert {t["arm"] for t in tests} == {*ARMS[1:]}
    assert {t["against"] for t in tests} == {"full"}
    assert all(t["p_holm"] >= t["p"] for t in tests)
    assert report["baselines"].keys() == {"zero-shot", "lead-1", "lead-3", "random-summary"}
    assert report["data"]["counts"] == {"train": 3, "test": 2}
    assert report["conclusions"][0].startswith("Too small to conclude")
    assert report["versions"].keys() >= {"torch", "tli-engine"}


def test_the_arms_are_what_they_are_called(compared: Path) -> None:
    recorded = {
        p.parent.name: yaml.safe_load(p.read_text()) for p in compared.glob("*/config.yaml")
    }
    kinds = {name.removesuffix("-5"): (c["objective"], c["method"]) for name, c in recorded.items()}
    assert kinds == {
        "full": ("sft", "full"),
        "lora-all": ("sft", "lora"),
        "lora-early": ("sft", "lora"),
        "tli-then-lora-early": ("sft", "lora"),
        "joint": ("joint", "lora"),
        "tli": ("align", "lora"),
    }
    assert recorded["full-5"]["train"]["learning_rate"] == 1e-3
    assert recorded["tli-5"]["train"]["steps"] is None
    assert recorded["tli-then-lora-early-5"]["lora"]["init"].endswith("tli-5/adapter")
    assert {c["seed"] for c in recorded.values()} == {5}


def test_a_page_that_fetches_nothing(compared: Path) -> None:
    page = (compared / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    fetched = re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'\s>]+)|url\(([^)]+)\)|@import", page)
    assert fetched == [("data:,", "")]
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert page.count("<svg") == 6
    # figures alone: no article and no summary
    for text, summary in ARTICLES:
        assert text not in page
        assert summary not in page
    card = (compared / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nbase_model:")
    assert "| lora-early | 1 |" in card
    assert "nrefs:1" in card


def test_what_is_done_is_not_done_again(
    cli: Cli, config: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(out / "lora-early-5")
    ran: list[str] = []

    def killed(comparison: Any, parts: list[str], jobs: int) -> dict[str, int]:
        ran.extend(parts)
        return dict.fromkeys(parts, 137)

    monkeypatch.setattr(_compare, "_in_processes", killed)
    result = cli("compare", config, "--out", out)
    assert result.status == 1
    assert ran == ["lora-early:5"]
    assert "lora-early:5: failed; the others go on" in result.err
    report = json.loads((out / "report.json").read_text())
    assert [a["name"] for a in report["arms"]] == [n for n in ARMS if n != "lora-early"]
    assert "Of the runs 1 is missing" in report["conclusions"][1]
    # one more seed of one arm; the arms are reported as far as they are asked for
    result = cli(
        "compare", config, "--out", out, "--set", "compare.seeds=[5, 6]",
        "--set", "compare.arms=[joint]",
    )  # fmt: skip
    assert ran == ["lora-early:5", "joint:6"]
    report = json.loads((out / "report.json").read_text())
    assert (report["reference"], report["tests"]) == ("joint", [])


def test_an_interrupted_run_goes_on(
    cli: Cli, config: Path, compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("compare", config, "--out", "cut", "--set", "compare.arms=[lora-early]")
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "append", at_step(2))
        result = cli(*arguments)
    assert result.status == 130
    assert "the same command goes on" in result.err
    assert not (tmp_path / "cut/report.json").exists()
    assert cli(*arguments, "--set", "compare.keep_weights=true").status == 0
    for name in ("predictions.jsonl", "adapter/adapter_model.safetensors"):
        found = [(f / "lora-early-5" / name).read_bytes() for f in (tmp_path / "cut", compared)]
        assert found[0] == found[1], name


def test_an_interrupted_run_goes_on_elsewhere(
    cli: Cli, config: Path, compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison's folder and the articles were moved after the first of an arm's two runs."""
    there = Path(shutil.copytree(config.parent, tmp_path / "there"))
    for path in (there / config.name, *there.glob("*.jsonl")):
        text = path.read_text(encoding="utf-8").replace(str(config.parent), str(there))
        path.write_text(text, encoding="utf-8")
    append = MetricsLog.append

    def stopping(self: MetricsLog, step: dict[str, Any]) -> None:
        append(self, step)
        if "labels" in step:
            signal.raise_signal(signal.SIGINT)

    only = ("--only", "tli-then-lora-early:5")
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "append", stopping)
        result = cli("compare", there / config.name, "--out", "there/out", *only)
    assert result.status == 130
    shutil.move(there / "out", tmp_path / "out")
    shutil.rmtree(there)
    result = cli("compare", config, "--out", "out", *only)
    assert result.status == 0, result.err
    assert "resuming after step 1 of 3" in result.err
    # what each part recorded of its base is known
    assert "has no digest of its base" not in result.err
    for name in ("predictions.jsonl", "adapter/adapter_model.safetensors"):
        found = [(f / "tli-then-lora-early-5" / name).read_bytes() for f in (Path("out"), compared)]
        assert found[0] == found[1], name


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("made_from configs 0 train learning_rate", 0.5, "made with another train.learning_rate"),
        ("made_from configs -1 lora r", 2, "made with another lora.r"),
        ("made_from texts train", "0", "was trained on other articles than there are now"),
        ("made_from texts validation", "0", "was chosen by other articles than there are now"),
        ("made_from pairs control", "0", "was measured on other word pairs than there are now"),
        ("made_from base_sha256", "0", "were made from another base model's weights"),
        ("made_from tokens_sha256", {}, "were made from another tokenizer"),
        ("predictions decoding beams", 3, "was written with beams 3; make it again"),
    ],
    ids=lambda value: str(value).rpartition(" ")[2],
)
def test_a_run_made_otherwise_is_not_compared(
    cli: Cli, config: Path, compared: Path, tmp_path: Path, path: str, value: Any, reason: str
) -> None:
    """As one from another machine may be, whose configuration or files were others."""
    folder = tmp_path / "out" / "tli-then-lora-early-5"
    for one in compared.glob("*/result.json"):
        (tmp_path / "out" / one.parent.name).mkdir(parents=True)
        for name in ("result.json", "predictions.jsonl", "metrics.jsonl"):
            if (one.parent / name).is_file():
                shutil.copy(one.parent / name, tmp_path / "out" / one.parent.name)
    shutil.copy(compared / "compare.yaml", tmp_path / "out")
    result = json.loads((folder / "result.json").read_text())
    *keys, last = path.split()
    within = result
    for key in keys:
        within = within[int(key) if isinstance(within, list) else key]
    assert within[last] != value
    within[last] = value
    (folder / "result.json").write_text(json.dumps(result))
    found = cli("compare", config, "--out", "out", "--gather")
    assert found.status == 2
    assert reason in found.err
    assert "tli-then-lora-early-5" in found.err


@pytest.mark.parametrize(("key", "value"), [("train.learning_rate", 0.5), ("dtype", "bfloat16")])
def test_a_run_begun_otherwise_does_not_go_on(
    cli: Cli, config: Path, compared: Path, tmp_path: Path, key: str, value: Any
) -> None:
    """As one that was interrupted on another machine may be."""
    folder = tmp_path / "out" / "lora-early-5"
    folder.mkdir(parents=True)
    settings = yaml.safe_load((compared / "compare.yaml").read_text()) | {"dtype": "float32"}
    (folder.parent / "compare.yaml").write_text(yaml.safe_dump(settings))
    recorded = yaml.safe_load((compared / "lora-early-5/config.yaml").read_text())
    section, _, last = key.rpartition(".")
    within = recorded[section] if section else recorded
    assert within[last] != value
    within[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(recorded))
    only = ("--set", "dtype=float32", "--only", "lora-early:5")
    result = cli("compare", config, "--out", "out", *only)
    assert result.status == 2
    assert f"lora-early-5: was made with another {key}; move it away" in result.err
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_pairs_that_changed_before_a_run_was_measured(
    cli: Cli, config: Path, compared: Path, tmp_path: Path, pairs_file: Path
) -> None:
    shutil.copytree(compared / "joint-5", tmp_path / "out/joint-5")
    shutil.copy(compared / "compare.yaml", tmp_path / "out")
    (tmp_path / "out/joint-5/result.json").unlink()
    pairs = tmp_path / pairs_file.name
    pairs.write_text(pairs_file.read_text().replace("maji,water", "mto,river"))
    only = ("--set", f"data.pairs={pairs}", "--only", "joint:5")
    result = cli("compare", config, "--out", "out", *only)
    assert result.status == 2
    assert "joint-5: was trained on other word pairs than there are now" in result.err
    assert not (tmp_path / "out/joint-5/result.json").exists()


def test_runs_that_went_on_from_two_adapters_are_not_compared(
    cli: Cli, config: Path, compared: Path, tmp_path: Path
) -> None:
    """On two machines, where one path may lead to either."""
    adapter = compared / "joint-5/adapter"
    begun = ("compare", config, "--out", "out", "--set", f"lora.init={adapter}")
    assert cli(*begun, "--only", "lora-early:5").status == 0
    other = Path(shutil.copytree(tmp_path / "out/lora-early-5", tmp_path / "out/lora-early-6"))
    result = json.loads((other / "result.json").read_text())
    made = result["made_from"]
    assert made["lora_init_sha256"] == sha256(adapter / "adapter_model.safetensors")
    made["configs"][0] |= {"seed": 6}
    made["configs"][0]["lora"] |= {"init": "/elsewhere/adapter"}
    gather = (*begun, "--gather", "--set", "compare.seeds=[5, 6]")
    for digest, status in ((made["lora_init_sha256"], 0), ("0", 2)):
        made["lora_init_sha256"] = digest
        (other / "result.json").write_text(json.dumps(result | {"seed": 6}))
        gathered = cli(*gather)
        assert gathered.status == status
    assert "were made from another adapter (lora.init); make both again from one" in gathered.err
    # an arm's own adapter, of TLI first, is another for each seed
    own = json.loads((compared / "tli-then-lora-early-5/result.json").read_text())
    assert own["made_from"]["lora_init_sha256"] is None


def test_articles_that_changed_between_two_runs_are_found_before_the_second(
    cli: Cli, config: Path, out: Path, tmp_path: Path
) -> None:
    there = Path(shutil.copytree(config.parent, tmp_path / "there")) / config.name
    there.write_text(there.read_text().replace(str(config.parent), str(there.parent)))
    articles = there.with_name("train.jsonl")
    articles.write_text(articles.read_text(encoding="utf-8").splitlines()[0] + "\n")
    for only in ((), ("--only", "joint:6")):
        result = cli("compare", there, "--out", out, "--set", "compare.seeds=[5, 6]", *only)
        assert result.status == 2
        assert "was trained on other articles than there are now" in result.err
    assert not (out / "joint-6").exists()


def test_summaries_written_since_are_not_taken(
    cli: Cli, config: Path, compared: Path, tmp_path: Path
) -> None:
    """``tli-engine evaluate`` of an arm writes those of other articles, maybe as many."""
    out = Path(shutil.copytree(compared, tmp_path / "out"))
    path = out / "full-5/predictions.jsonl"
    path.write_text(path.read_text().replace('"prediction": "', '"prediction": "Mvua '))
    result = cli("compare", config, "--out", out, "--gather")
    assert result.status == 2
    assert "full-5/predictions.jsonl: is not what was written with the figures" in result.err


def test_the_language_may_be_named_afterwards(
    cli: Cli, config: Path, compared: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(compared, tmp_path / "out"))
    result = cli("compare", config, "--out", out, "--gather", "--set", "data.language=thai")
    assert result.status == 0, result.err
    for arm in json.loads((out / "report.json").read_text())["arms"]:
        assert "|tok:char|" in arm["text"]["bleu"]["signature"]


def test_runs_of_several_machines_make_the_report_of_one(
    cli: Cli, config: Path, compared: Path, tmp_path: Path
) -> None:
    """Each run's folder comes from elsewhere, as figures and predictions alone."""
    shutil.copytree(config.parent, tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere" / config.name
    moved.write_text(moved.read_text().replace(str(config.parent), str(moved.parent)))
    gathered = tmp_path / "gathered"
    for folder in [f for f in compared.iterdir() if (f / "result.json").is_file()]:
        (gathered / folder.name).mkdir(parents=True)
        for name in ("result.json", "predictions.jsonl", "metrics.jsonl"):
            if (folder / name).is_file():
                shutil.copy(folder / name, gathered / folder.name)
    shutil.copy(compared / "compare.yaml", gathered)
    assert cli("compare", moved, "--out", gathered, "--gather").status == 0
    for name in ("report.json", "report.html", "README.md"):
        assert (gathered / name).read_text() == (compared / name).read_text(), name
        # nor does a report say where anything lay
        assert str(config.parent) not in (gathered / name).read_text()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--only", "full:7"), "--only full:7: no such run; there are base full:5"),
        (("--only", "base", "--gather"), "do not go together"),
        (("--set", "train.steps=4"), "was begun with another train.steps"),
        (("--set", "compare.beams=2"), "was begun with another compare.beams"),
        (("--set", "compare.arms=[half]"), "compare.arms.0: input should be 'full'"),
        (("--set", "compare.seed=1"), "compare.seed: unknown key; known here: arms, seeds"),
        (("--set", "compare.seeds=[1, 1]"), "compare.seeds must be different ones"),
        (("--set", "compare.set.joint.align.layer=x"), "arm joint: align.layer"),
        (("--set", "data.test=none.jsonl"), "none.jsonl"),
        # of an arm that is not compared this time
        (
            ("--set", "compare.arms=[full]", "--set", "compare.set.joint.lora.r=x"),
            "arm joint: lora.r",
        ),
        (("--set", "compare.set.half={}"), "compare.set.half: input should be 'full', "),
    ],
)
def test_what_cannot_be(
    cli: Cli, config: Path, out: Path, arguments: tuple[str, ...], reason: str
) -> None:
    result = cli("compare", config, "--out", out, *arguments)
    assert result.status == 2
    assert reason in result.err
