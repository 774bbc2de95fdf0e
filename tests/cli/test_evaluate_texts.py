"""``evaluate`` of a run on summaries: strengths, bits per byte, and options that would mean nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tli_engine.evaluate.bits_per_byte import bits_per_byte
from tli_engine.models.early import load_early
from tli_engine.models.files import open_model
from tli_engine.models.peft_format import load_adapter

Cli = Callable[..., Any]
SHORT = ("--max-new-tokens", "6")
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tli_engine.cli._train_sft.plot_losses", lambda steps, before, path: path.write_bytes(b"")
    )


@pytest.fixture(params=["modules"])
def summaries(cli: Cli, sft_config: Callable[..., Path], request: pytest.FixtureRequest) -> Path:
    """A finished run on summaries."""
    assert cli("train", sft_config(train={"engine": request.param}), "--run", "run").status == 0
    return Path("run")


def evaluated(cli: Cli, run: Path, *options: object) -> tuple[dict[str, Any], Any]:
    result = cli("evaluate", run, *SHORT, *options)
    assert result.status == 0, result.err
    return json.loads((run / "evaluation.json").read_text(encoding="utf-8")), result


@pytest.mark.parametrize("summaries", ["modules", "fused"], indirect=True)
def test_a_run_is_measured_at_each_strength(cli: Cli, summaries: Path) -> None:
    found, result = evaluated(cli, summaries, "--strength", "1,0.5,0")
    losses = found["loss"]["validation"]
    by_strength = losses["after_by_strength"]
    assert list(by_strength) == ["1.0", "0.5", "0.0"]
    assert len(set(by_strength.values())) == 3
    # no adapter is the base model; the last strength stands for the run
    assert losses["after"] == by_strength["0.0"] == pytest.approx(losses["before"], abs=1e-6)
    assert found["text"] == found["text_by_strength"]["0.0"] == found["baselines"]["zero-shot"]
    assert found["predictions"]["decoding"]["strength"] == 0.0
    for strength in ("", " at strength 0.5", " at strength 0.0"):
        assert f"nats a token{strength}\n" in result.out
        assert any(
            line.strip().startswith(f"this run{strength} ") for line in result.out.splitlines()
        )
    # half the adapter is an adapter of half the B matrices
    half, _ = evaluated(cli, summaries, "--strength", "0.5")
    predictions = (summaries / "predictions.jsonl").read_bytes()
    scaled = Path(shutil.copytree(summaries, "scaled"))
    tensors = load_file(scaled / ADAPTER)
    save_file(
        {n: t / 2 if "lora_B" in n else t for n, t in tensors.items()},
        scaled / ADAPTER,
        metadata={"format": "pt"},
    )
    again, _ = evaluated(cli, scaled)
    assert again["loss"]["validation"]["after"] == pytest.approx(by_strength["0.5"], abs=1e-6)
    assert (scaled / "predictions.jsonl").read_bytes() == predictions
    assert again["text"] == half["text"] == found["text_by_strength"]["0.5"]
    result = cli("evaluate", scaled, *SHORT, "--against", summaries)
    assert "this run's with strength 1.0, run's with strength 0.5" in result.out


@pytest.mark.parametrize("method", ["lora", "full"])
def test_another_base_is_refused(
    cli: Cli, sft_config: Callable[..., Path], tiny_model: Path, tmp_path: Path, method: str
) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    config = sft_config(model=str(base), method=method, train={"steps": 1})
    assert cli("train", config, "--run", "run").status == 0
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    before = Path("run/evaluation.json").read_bytes()
    result = cli("evaluate", "run", *SHORT)
    assert (result.status, result.out) == (2, "")
    assert f"error: {base}: its weights are not those that run was trained on" in result.err
    assert Path("run/evaluation.json").read_bytes() == before


@pytest.mark.parametrize("method", ["lora", "full"])
def test_bits_per_byte_of_a_run_on_summaries(
    cli: Cli, sft_config: Callable[..., Path], tiny_model: Path, method: str
) -> None:
    train = {"learning_rate": 1e-3} if method == "full" else {}
    assert cli("train", sft_config(method=method, train=train), "--run", "run").status == 0
    Path("some.txt").write_text("Maji ni uhai.\n\nMoto si maji.\n", encoding="utf-8")
    run = Path("run")
    strengths = ("0.5", "1.0") if method == "lora" else ("1.0",)
    found, result = evaluated(cli, run, "--text", "some.txt", "--strength", ",".join(strengths))
    cost = found["bits_per_byte"]["some.txt"]
    assert list(cost["after_by_strength"]) == list(strengths)
    assert result.out.count("bits per byte") == len(strengths)
    bits = {}
    for stage, folder in (("before", tiny_model), ("after", run / "model")):
        files = open_model(str(folder if method == "full" else tiny_model))
        model = load_early(files, 3, dtype=torch.float32, device=torch.device("cpu"))
        if (stage, method) == ("after", "lora"):
            load_adapter(model, run / "adapter")
        head = files.source.read("lm_head.weight")
        lines = ["Maji ni uhai.", "Moto si maji."]
        bits[stage] = bits_per_byte(model, files.tokenizer, head, lines)
    assert cost["before"] == pytest.approx(bits["before"], rel=1e-6)
    assert cost["after"] == pytest.approx(bits["after"], rel=1e-6)
    assert bits["before"] != bits["after"]


def test_a_summary_ends_where_the_models_authors_end_a_text(
    cli: Cli, sft_config: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    path = base / "generation_config.json"
    assert cli("train", sft_config(model=str(base), train={"steps": 1}), "--run", "run").status == 0
    free, _ = evaluated(cli, Path("run"))
    assert free["predictions"]["decoding"]["eos_token_ids"] == [1]
    assert free["generation"]["tokens"] == 12
    # one of three bytes is what is written
    path.write_text(json.dumps({"eos_token_id": [1, *range(2, 258, 3), *range(3, 258, 3)]}))
    found, _ = evaluated(cli, Path("run"))
    assert len(found["predictions"]["decoding"]["eos_token_ids"]) == 172
    assert found["generation"]["tokens"] < 12
    path.write_text("[1")
    assert "generation_config.json: not a generation's configuration" in refused(cli, "run")
    for stated, said in (("x", '"x"'), ([1, [2]], "[2]"), (1.5, "1.5"), ([None], "null")):
        path.write_text(json.dumps({"eos_token_id": stated}))
        message = f"generation_config.json: eos_token_id: {said} is no token's number"
        assert message in refused(cli, "run")


def refused(cli: Cli, *arguments: object) -> str:
    """The one line of a command that ends with status 2."""
    result = cli("evaluate", *arguments)
    assert (result.status, result.out) == (2, ""), result.err
    (line,) = result.err.splitlines()
    return str(line)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--pooling", "last"), "--pooling: this run has no word pairs"),
        (("--no-final-layer",), "--no-final-layer: this run has no word pairs"),
        (("--final-layer",), "--final-layer: this run has no word pairs"),
        (("--top-p", "0.9"), "--top-p: nothing is drawn without --temperature"),
        (("--seed", "0"), "--seed: nothing is drawn without --temperature"),
        (("--top-p", "0.9", "--beams", "2"), "--top-p: beams draw nothing"),
        (("--seed", "1", "--beams", "2"), "--seed: beams draw nothing"),
        (("--temperature", "nan"), "--temperature: must be a number, got nan"),
        (("--temperature", "1", "--top-p", "nan"), "--top-p: must be a number, got nan"),
        (("--temperature", "1", "--seed", str(2**63)), "Invalid value for '--seed'"),
        (("--text", "none.txt"), "none.txt: cannot be read"),
        (("--max-new-tokens", "75"), "in a context of 80; lower --max-new-tokens"),
    ],
)
def test_what_cannot_be_or_would_mean_nothing_is_refused(
    cli: Cli, summaries: Path, options: tuple[str, ...], reason: str
) -> None:
    assert reason in refused(cli, summaries, *options)


def test_a_run_on_summaries_that_trained_every_weight_has_one_strength(
    cli: Cli, sft_config: Callable[..., Path]
) -> None:
    path = sft_config(method="full", train={"learning_rate": 1e-3})
    assert cli("train", path, "--run", "run").status == 0
    line = refused(cli, "run", "--strength", "0.5")
    assert "--strength: this run trained every weight; only an adapter can be scaled" in line


@pytest.mark.parametrize(
    "options",
    [
        *(("--max-new-tokens", "64"), ("--batch-size", "16"), ("--beams", "1")),
        *(("--temperature", "1"), ("--against", "other")),
    ],
)
def test_how_to_write_is_refused_of_a_run_that_writes_nothing(
    cli: Cli, run: Path, options: tuple[str, str]
) -> None:
    assert f"{options[0]}: this run writes no summaries" in refused(cli, run, *options)


def test_a_joint_run_without_unseen_articles_writes_nothing(
    cli: Cli, sft_config: Callable[..., Path], pairs_file: Path
) -> None:
    data = {"pairs": str(pairs_file), "validation": None}
    path = sft_config(objective="joint", data=data, align={"layer": 2}, sft={"align_pairs": 4})
    assert cli("train", path, "--run", "run").status == 0
    assert "--beams: this run writes no summaries" in refused(cli, "run", "--beams", "2")


def test_words_of_a_language_without_spaces(cli: Cli, sft_config: Callable[..., Path]) -> None:
    rows = [
        ("昨夜的大雨淹没了村庄的道路。", "大雨淹没道路"),
        ("国家队赢得了首场比赛。", "国家队获胜"),
    ]
    lines = [json.dumps({"text": text, "summary": summary}) for text, summary in rows]
    Path("unseen.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    path = sft_config(train={"steps": 1}, sft={"context": 128})
    assert cli("train", path, "--run", "run").status == 0
    for options, tokenizer in (((), "13a"), (("--language", "zh-CN"), "zh")):
        found, result = evaluated(cli, Path("run"), *options)
        assert f"|tok:{tokenizer}|" in found["text"]["bleu"]["signature"]
        for names, metric in (("BLEU", "bleu"), ("ROUGE-1, ROUGE-2, ROUGE-L", "rouge1")):
            assert f"  {names}: {found['text'][metric]['signature']}\n" in result.out
        assert ("the texts have hardly any spaces" in result.err) == (tokenizer == "13a")
    assert cli("train", path, "--run", "named", "--set", "data.language=thai").status == 0
    found, result = evaluated(cli, Path("named"))
    assert "|tok:char|" in found["text"]["bleu"]["signature"]
    assert "|tok:xlsum-char|" in found["text"]["rougeL"]["signature"]
    assert "hardly any spaces" not in result.err
