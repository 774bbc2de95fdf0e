"""Commands from end to end on a GPU, where the engine's ops and CUDA graphs are the default."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.cli.conftest import ARTICLES
from tests.interrupt import at_step
from tli_engine.cli import main
from tli_engine.evaluate.compare.config import ARMS
from tli_engine.testing import save_tiny_model
from tli_engine.train.metrics import MetricsLog

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "max_position_embeddings": 512,
}  # fmt: skip
WORDS = [
    ("maji", "water"), ("moto", "fire"), ("nyumba", "house"), ("mti", "tree"), ("ndege", "bird"),
    ("samaki", "fish"), ("jua", "sun"), ("mwezi", "moon"), ("chumvi", "salt"), ("kitabu", "book"),
]  # fmt: skip
CONTROL = [("barabara", "road"), ("mvua", "rain"), ("mlango", "door"), ("kisu", "knife")]
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama", **SIZES)


@pytest.fixture
def write(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a configuration, and the data that it names, to an empty folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [f"{a},{b},{s}" for s, side in (("train", WORDS), ("control", CONTROL)) for a, b in side]
    Path("pairs.csv").write_text("\n".join(["swahili,english,split", *rows]) + "\n")
    for name, part in (("texts", ARTICLES[:4]), ("unseen", ARTICLES[4:])):
        lines = [json.dumps({"text": text, "summary": summary}) for text, summary in part]
        Path(f"{name}.jsonl").write_text("\n".join(lines) + "\n")

    def write(**changes: Any) -> Path:
        values: dict[str, Any] = {
            "model": str(model), "device": "cuda", "lora": {"layers": "0-1", "r": 8, "dropout": 0.1},
            "data": {"pairs": "pairs.csv"}, "align": {"layer": 2},
            "train": {"steps": 6, "batch_size": 4, "learning_rate": 1e-3, "checkpoint_steps": 2},
        }  # fmt: skip
        for section, change in changes.items():
            old = values.get(section)
            values[section] = old | change if isinstance(old, dict) else change
        Path("run.yaml").write_text(yaml.safe_dump(values))
        return Path("run.yaml")

    return write


def succeeds(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def losses(run: str) -> list[float]:
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def goes_on_alike(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, whole and interrupted; ``run`` is the second."""
    succeeds("train", config, "--run", "whole")
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "append", at_step(3))
        assert main(["train", str(config), "--run", "run"]) != 0
    succeeds("train", "--resume", "--run", "run")
    assert losses("run") == pytest.approx(losses("whole"), abs=5e-3)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="infonce"),
        pytest.param({"align": {"space": "whitened"}}, id="whitened"),
        pytest.param({"quantize": "nf4", "align": {"loss": "triplet-hardest"}}, id="nf4-triplet"),
        pytest.param({"train": {"chunk_tokens": 16}}, id="chunks"),
    ],
)
def test_word_pairs(changes: dict[str, Any], write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on_alike(write(**changes), monkeypatch)
    succeeds("evaluate", "run")
    succeeds("verify", "run")
    succeeds("export", "run", "--format", "merged", "--out", "merged")
    succeeds("scan", "merged", "--pairs", "pairs.csv", "--out", "scan")
    found = json.loads(Path("scan/scan.json").read_text())
    assert len(found["layers"]) == 5


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="lora"),
        pytest.param({"quantize": "nf4", "sft": {"activations": "recompute"}}, id="nf4"),
        pytest.param({"method": "full"}, id="full"),
        pytest.param({"method": "full", "train": {"in_backward": True}}, id="in-backward"),
        pytest.param({"method": "full", "train": {"rounding": "stochastic"}}, id="stochastic"),
        pytest.param({"train": {"cuda_graph": False, "accumulate": 2}}, id="launches"),
        pytest.param({"train": {"engine": "modules"}}, id="modules"),
        pytest.param({"objective": "joint"}, id="joint"),
    ],
)
def test_summaries(changes: dict[str, Any], write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"texts": "texts.jsonl", "validation": "unseen.jsonl"}
    sections: dict[str, Any] = {"sft": {"context": 96, "evaluate_steps": 3}, "train": {}}
    for name, change in changes.items():
        old = sections.get(name)
        sections[name] = old | change if isinstance(old, dict) else change
    sections["train"] = {"batch_size": 2} | sections["train"]
    config = write(**{"objective": "sft", "data": texts} | sections)
    goes_on_alike(config, monkeypatch)
    is_full = changes.get("method") == "full"
    measured_at_strengths(["1.0"] if is_full else ["0.0", "1.0"])
    succeeds("export", "run", "--format", "nf4", "--out", "nf4")
    found = json.loads(Path("nf4/export.json").read_text())["logit_drift"]["against"]
    in_nf4 = "base model in NF4 and adapter" if "quantize" in changes else "base model and adapter"
    assert found == ("trained model" if is_full else in_nf4)


def measured_at_strengths(strengths: list[str]) -> None:
    """Evaluate ``run``: graphs and joined weights take the strength that is asked for."""
    Path("text.txt").write_text("Mvua kubwa imenyesha mjini leo.\n", encoding="utf-8")
    options = ("--strength", ",".join(strengths), "--text", "text.txt")
    succeeds("evaluate", "run", "--max-new-tokens", 8, *options)
    found = json.loads(Path("run/evaluation.json").read_text())
    cost, loss = found["bits_per_byte"]["text.txt"], found["loss"]["validation"]
    for figure in (cost, loss):
        after = figure["after_by_strength"]
        assert list(after) == strengths
        assert after["1.0"] == figure["after"] != figure["before"]
        if "0.0" in after:
            assert after["0.0"] == pytest.approx(figure["before"], rel=1e-3)


def test_a_comparison(write: Write) -> None:
    """Every arm, each by a command of its own, gathered."""
    texts = {"texts": "texts.jsonl", "validation": "unseen.jsonl", "test": "unseen.jsonl"}
    config = write(
        data=texts,
        sft={"context": 96},
        train={"batch_size": 2},
        compare={"max_new_tokens": 4, "seeds": [0, 1]},
    )
    for part in ("base", *(f"{arm}:{seed}" for arm in ARMS for seed in (0, 1))):
        succeeds("compare", config, "--out", "compared", "--only", part)
    succeeds("compare", config, "--out", "compared", "--gather")
    report = json.loads(Path("compared/report.json").read_text())
    assert [arm["name"] for arm in report["arms"]] == list(ARMS)
