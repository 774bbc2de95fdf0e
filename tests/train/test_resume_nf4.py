"""Training on NF4 layers, whose dropout is of one seed a call, goes on bit for bit as well."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.interrupt import at_step
from tli_engine.cli import _train_align, main
from tli_engine.nn import NF4Linear
from tli_engine.testing import save_tiny_model
from tli_engine.train.metrics import MetricsLog

STEPS = 12
WORDS = [(f"neno{i}", f"word{chr(97 + i % 26)}{i}") for i in range(20)]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration of 12 steps with dropout and a checkpoint every 5, unevaluated."""
    monkeypatch.setattr(_train_align, "report_alignment", lambda *args: None)
    monkeypatch.setattr(_train_align, "plot_training", lambda *args: None)
    save_tiny_model(tmp_path / "model", "llama")
    pairs = [{"swahili": s, "english": e} for s, e in WORDS]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    (tmp_path / "config.yaml").write_text(
        f"""
model: {tmp_path / "model"}
device: cpu
quantize: nf4
data: {{pairs: {tmp_path / "pairs.json"}}}
lora: {{dropout: 0.2, modules: [q_proj, down_proj]}}
train: {{steps: {STEPS}, batch_size: 6, learning_rate: 0.01, checkpoint_steps: 5}}
"""
    )
    return tmp_path / "config.yaml"


def result(run: Path) -> tuple[list[float], str]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    adapter = (run / "adapter/adapter_model.safetensors").read_bytes()
    return [json.loads(line)["loss"] for line in lines], hashlib.sha256(adapter).hexdigest()


class PowerCutError(Exception):
    """The process is gone: no handler runs, nothing is kept."""


def cut() -> None:
    raise PowerCutError


def test_goes_on_bit_for_bit(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, forward = [], NF4Linear.lora_forward

    def counted(self: NF4Linear, *args: Any, **options: Any) -> Any:
        calls.append(options)
        return forward(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(NF4Linear, "lora_forward", counted)
        assert main(["train", str(config), "--run", str(tmp_path / "whole")]) == 0
    seeds = [int(options["seed"]) for options in calls if options["dropout"] > 0]
    # each call of each step draws its own
    assert len(seeds) == len(set(seeds)) >= STEPS
    whole = result(tmp_path / "whole")
    assert len(whole[0]) == STEPS

    stopped, crashed = tmp_path / "stopped", tmp_path / "crashed"
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "append", at_step(3))
        assert main(["train", str(config), "--run", str(stopped)]) == 130
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "append", at_step(7, cut))
        with pytest.raises(PowerCutError):
            main(["train", str(config), "--run", str(crashed)])
    for run in (stopped, crashed):
        assert main(["train", "--resume", "--run", str(run)]) == 0
        assert result(run) == whole
