"""``tli-engine evaluate`` on the word pairs of a run that trained every weight, and other poolings."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tli_engine.align.encode import encode
from tli_engine.config import read_yaml, resolve_config
from tli_engine.data.splits import read_run_pairs, tokenize_splits
from tli_engine.models.early import load_early
from tli_engine.models.files import open_model

Cli = Callable[..., Any]


@pytest.fixture
def run(cli: Cli, tiny_model: Path, pairs_file: Path, tmp_path: Path) -> Callable[..., Path]:
    def made(**changes: Any) -> Path:
        for name, texts in (("train", "ab"), ("unseen", "cd")):
            rows = [{"text": f"Habari ya {t}. Mvua.", "summary": f"Mvua {t}"} for t in texts]
            lines = "\n".join(json.dumps(row) for row in rows)
            (tmp_path / f"{name}.jsonl").write_text(lines + "\n", encoding="utf-8")
        data = {"texts": "train.jsonl", "validation": "unseen.jsonl", "pairs": str(pairs_file)}
        values = {
            "model": str(tiny_model), "device": "cpu", "objective": "joint", "data": data,
            "prompt": {"instruction": "Fupisha: {text}"}, "lora": {"layers": "0-1", "r": 4},
            "align": {"layer": 2}, "sft": {"context": 96, "align_pairs": 4},
            "train": {"steps": 2, "batch_size": 1, "learning_rate": 1e-2},
        } | changes  # fmt: skip
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        result = cli("train", path, "--run", "run")
        assert result.status == 0, result.err
        return Path("run")

    return made


def evaluated(cli: Cli, run: Path, *options: Any) -> dict[str, Any]:
    result = cli("evaluate", run, "--max-new-tokens", "2", *options)
    assert result.status == 0, result.err
    found: dict[str, Any] = json.loads((run / "evaluation.json").read_text())
    return found


def mean_cosine(run: Path, model: str, layer: int) -> float:
    """Of the training pairs, by the model in a folder."""
    config = resolve_config(read_yaml(run / "config.yaml"), "run")
    files = open_model(model)
    split = tokenize_splits(read_run_pairs(config.data), files.tokenizer, config.words)[0]
    early = load_early(files, 3, dtype=torch.float32, device=torch.device("cpu"))
    source, target = encode(early, split.words, [layer], config.align.pooling)[0].chunk(2)
    return float(torch.nn.functional.cosine_similarity(source, target).mean())


def test_pairs_of_a_run_that_trained_every_weight(
    cli: Cli, run: Callable[..., Path], tiny_model: Path
) -> None:
    folder = run(method="full")
    Path("text.txt").write_text("Mvua kubwa.\nJua kali.\n")
    found = evaluated(cli, folder, "--text", "text.txt")
    assert found.keys() >= {"alignment", "text", "loss", "generation", "bits_per_byte"}
    assert found["baselines"].keys() >= {"linear_head", "zero-shot", "lead-1"}
    rows = found["alignment"]
    assert {(row["layer"], row["split"]) for row in rows} == {
        (layer, split) for layer in (2, 3) for split in ("train", "control")
    }
    for row in rows:
        if (row["score"], row["split"]) == ("cosine", "train"):
            stages = {"before": str(tiny_model), "after": str(folder / "model")}
            for stage, model in stages.items():
                expected = mean_cosine(folder, model, row["layer"])
                assert row[stage]["cosine_true"] == pytest.approx(expected, abs=1e-5)
            assert row["before"]["cosine_true"] != row["after"]["cosine_true"]
    bits = found["bits_per_byte"]["text.txt"]
    assert bits["before"] != bits["after"] == bits["after_by_strength"]["1.0"]
    assert (folder / "layers.png").is_file()


def test_there_is_nothing_to_scale(cli: Cli, run: Callable[..., Path]) -> None:
    result = cli("evaluate", run(method="full"), "--strength", "0.5")
    assert result.status == 2
    assert "--strength: this run trained every weight; only an adapter" in result.err


@pytest.mark.parametrize("method", ["lora", "full"])
def test_another_pooling(cli: Cli, run: Callable[..., Path], method: str) -> None:
    folder = run(method=method)
    by_pooling = {}
    for pooling in (None, "last", "paper"):
        options = ("--pooling", pooling) if pooling else ()
        rows = evaluated(cli, folder, "--no-final-layer", *options)["alignment"]
        assert {row["pooling"] for row in rows} == {pooling or "content"}
        by_pooling[pooling] = [row["before"]["cosine_true"] for row in rows]
    assert len({tuple(values) for values in by_pooling.values()}) == 3
    # the run itself stands as it was trained
    assert read_yaml(folder / "config.yaml")["align"]["pooling"] == "content"


def test_what_has_no_pairs_has_no_pooling(cli: Cli, run: Callable[..., Path]) -> None:
    result = cli("evaluate", run(objective="sft"), "--pooling", "last")
    assert result.status == 2
    assert "--pooling: this run has no word pairs" in result.err


def test_summaries_are_drawn_by_a_seed(cli: Cli, run: Callable[..., Path]) -> None:
    folder = run(objective="sft")
    drawn = []
    for options in (
        (),
        ("--temperature", 3),
        ("--temperature", 3),
        ("--temperature", 3, "--seed", 1),
    ):
        assert cli("evaluate", folder, "--max-new-tokens", 12, *options).status == 0
        drawn.append((folder / "predictions.jsonl").read_text())
    assert drawn[1] == drawn[2]
    assert len(set(drawn)) == 3
    result = cli("evaluate", folder, "--temperature", 1, "--beams", 2)
    assert result.status == 2
    assert "--beams and --temperature do not go together" in result.err
