"""Fine-tuning that is interrupted, through the command line: it goes on as if it had not been."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.interrupt import at_step
from tli_engine.models.causal import CausalModel
from tli_engine.train.metrics import MetricsLog
from tli_engine.train.sft_loop import SftTrainer

Cli = Callable[..., Any]


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is most of the time that a tiny model takes."""
    monkeypatch.setattr(
        "tli_engine.cli._train_sft.plot_losses", lambda steps, before, path: path.write_bytes(b"")
    )


@pytest.mark.parametrize("engine", ["modules", "fused"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_interrupted_run_goes_on_bit_for_bit(
    cli: Cli,
    sft_config: Callable[..., Path],
    method: str,
    engine: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = sft_config(method=method, train={"engine": engine})
    assert cli("train", path, "--run", "whole").status == 0
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "append", at_step(3))
        result = cli("train", path, "--run", "run")
    assert result.status != 0
    assert "resume with: tli-engine train --resume --run run" in result.err
    if engine == "fused":
        # as if several processes had begun it
        shares = {"lora": ("replicated", "sharded"), "full": ("offload: false", "offload: true")}
        record = Path("run/config.yaml")
        record.write_text(record.read_text().replace(*shares[method]))
    resumed = cli("train", "--resume", "--run", "run")
    assert resumed.status == 0
    assert resumed.err.count("one process: it holds what several had shares of") == (
        engine == "fused"
    )
    name = "model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors"
    assert (Path("whole") / name).read_bytes() == (Path("run") / name).read_bytes()
    losses = [
        [
            json.loads(line)["loss"]
            for line in (Path(run) / "metrics.jsonl").read_text().splitlines()
        ]
        for run in ("whole", "run")
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("measurement", [1, 2, 3])
def test_a_signal_is_heard_while_unseen_articles_are_run(
    measurement: int, cli: Cli, sft_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before training, amid it, and after its last step; the figures of that step come later."""
    path = sft_config(train={"checkpoint_steps": 2, "engine": "fused"})
    assert cli("train", path, "--run", "whole").status == 0
    batches = []

    def stopping(model: CausalModel, pack: Any) -> Any:
        if not model.training:
            batches.append(pack)
            if len(batches) == 2 * measurement - 1:
                signal.raise_signal(signal.SIGTERM)
        return loss(model, pack)

    loss = CausalModel.loss
    with monkeypatch.context() as patch:
        patch.setattr(CausalModel, "loss", stopping)
        assert cli("train", path, "--run", "run").status == 128 + signal.SIGTERM
    # the second batch of that measurement is not run
    assert len(batches) == 2 * measurement - 1
    assert cli("train", "--resume", "--run", "run").status == 0
    assert metrics("run") == metrics("whole")
    name = "adapter/adapter_model.safetensors"
    assert Path("run", name).read_bytes() == Path("whole", name).read_bytes()
    assert evaluation("run") == evaluation("whole")


def test_an_interrupted_measurement_is_made_once(
    cli: Cli, sft_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on from it and crashes later goes on from the same checkpoint again."""
    path = sft_config()
    assert cli("train", path, "--run", "whole").status == 0

    def stopping(self: SftTrainer, *args: Any) -> float:
        if self.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return validate(self, *args)

    def crashing(self: MetricsLog, step: dict[str, Any]) -> None:
        append(self, step)
        if step["step"] == 2:
            raise OSError("crashed")

    validate, append = SftTrainer.validate, MetricsLog.append
    with monkeypatch.context() as patch:
        patch.setattr(SftTrainer, "validate", stopping)
        assert cli("train", path, "--run", "run").status == 128 + signal.SIGTERM
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "append", crashing)
        assert cli("train", "--resume", "--run", "run").status == 1
    assert cli("train", "--resume", "--run", "run").status == 0
    assert metrics("run") == metrics("whole")
    assert evaluation("run") == evaluation("whole")


@pytest.mark.parametrize("missing", ["nothing", "state.json", "."])
def test_a_best_of_an_end_that_was_lost_is_not_an_earlier_one(
    missing: str, cli: Cli, sft_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run goes on from before its best weights so far, and its time ends before it has them again.

    They may be lost altogether, where it was killed as they took the place of earlier ones.
    """
    path = sft_config(sft={"evaluate_steps": 1}, train={"steps": 6, "checkpoint_steps": 2})
    losses = [3.0, 2.5, 2.0, 2.2, 1.0]
    monkeypatch.setattr(SftTrainer, "validate", lambda self, *args: losses[self.step])
    append = MetricsLog.append

    def crashing(self: MetricsLog, step: dict[str, Any]) -> None:
        if step["step"] == 4:
            raise OSError("crashed")
        append(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "append", crashing)
        assert cli("train", path, "--run", "run").status == 1
    if missing == ".":
        shutil.rmtree("run/best")
    else:
        Path("run/best", missing).unlink(missing_ok=True)
    monkeypatch.setattr(SftTrainer, "is_spent", property(lambda self: self.step >= 3))
    assert cli("train", "--resume", "--run", "run").status == 0
    # those of step 2 are lost
    assert evaluation("run")["validation"] == {"before": 3.0, "after": 2.2, "best_step": 3}
    losses[1:3] = [3.0, 3.0]
    assert cli("train", path, "--run", "whole").status == 0
    name = "adapter/adapter_model.safetensors"
    assert Path("run", name).read_bytes() == Path("whole", name).read_bytes()


def metrics(run: str) -> list[dict[str, float]]:
    """The lines of a run, but for times and memory."""
    lines = map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())
    changing = ("seconds", "tokens_per_s", "peak_mib")
    return [{k: v for k, v in line.items() if k not in changing} for line in lines]


def evaluation(run: str) -> Any:
    return json.loads(Path(run, "evaluation.json").read_text())["loss"]
