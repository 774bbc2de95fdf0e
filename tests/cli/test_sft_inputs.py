"""What a run on summaries is made from: articles that are unseen, and the tokenizer that reads them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.interrupt import at_step
from tli_engine.train.metrics import MetricsLog

Cli = Callable[..., Any]


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tli_engine.cli._train_sft.plot_losses", lambda steps, before, path: path.write_bytes(b"")
    )


def test_articles_that_are_in_training_too_are_warned_of(
    cli: Cli, sft_config: Callable[..., Path], articles: Path, tmp_path: Path
) -> None:
    lines = articles.read_text(encoding="utf-8").splitlines()
    unseen = (tmp_path / "unseen.jsonl").read_text(encoding="utf-8")
    (tmp_path / "leaky.jsonl").write_text(f"{unseen}{lines[2]}\n", encoding="utf-8")
    line = "1 of 3 {} articles are in training, too"
    one_step = {"steps": 1}
    for split in ("validation", "test"):
        config = sft_config(data={split: str(tmp_path / "leaky.jsonl")}, train=one_step)
        result = cli("train", config, "--run", split)
        assert result.status == 0, result.err
        assert f"warning: {line.format(split)}" in result.err
        warnings = json.loads(Path(split, "evaluation.json").read_text())["warnings"]
        assert any(line.format(split) in warning for warning in warnings)
    result = cli("train", sft_config(train=one_step), "--run", "clean")
    assert "in training, too" not in result.err


def test_another_tokenizer_does_not_go_on(
    cli: Cli,
    sft_config: Callable[..., Path],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "append", at_step(2))
        assert cli("train", sft_config(model=str(model)), "--run", "run").status != 0
    template = model / "chat_template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    result = cli("train", "--resume", "--run", "run")
    assert (result.status, result.out) == (2, "")
    assert "run: cannot resume: tokens_sha256 is not what the run began with" in result.err
    assert "the tokenizer or its chat template is another" in result.err
    # of a run that recorded nothing a line says so
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    del config["provenance"]["tokens_sha256"]
    Path("run/config.yaml").write_text(yaml.safe_dump(config))
    template.unlink()
    result = cli("train", "--resume", "--run", "run")
    assert result.status == 0, result.err
    assert "warning: run: has no tokens_sha256" in result.err
