"""An interrupted run goes on bit for bit, wherever it was interrupted."""

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.interrupt import at_step
from tli_engine.cli import _train_align, main
from tli_engine.testing import save_tiny_model
from tli_engine.train.manifest import write_manifest
from tli_engine.train.metrics import MetricsLog

STEPS = 24
WORDS = [(f"neno{i}", f"word{chr(97 + i % 26)}{i}") for i in range(20)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of 24 steps in several epochs, with dropout and a checkpoint every 5."""
    folder = tmp_path_factory.mktemp("config")
    save_tiny_model(folder / "model", "llama")
    pairs = [{"swahili": s, "english": e} for s, e in WORDS]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    (folder / "config.yaml").write_text(
        f"""
model: {folder / "model"}
device: cpu
data: {{pairs: {folder / "pairs.json"}}}
lora: {{dropout: 0.1, modules: [q_proj, down_proj]}}
align: {{space: whitened}}
train: {{steps: {STEPS}, batch_size: 6, learning_rate: 0.01, warmup_steps: 3, checkpoint_steps: 5}}
"""
    )
    return folder / "config.yaml"


@pytest.fixture(autouse=True)
def _no_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's end is not what is tested here, and takes most of the time."""
    monkeypatch.setattr(_train_align, "report_alignment", lambda *args: None)
    monkeypatch.setattr(_train_align, "plot_training", lambda *args: None)


def losses(run: Path) -> list[tuple[int, float, float]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [(m["step"], m["loss"], m["lr"]) for m in map(json.loads, lines)]


def adapter_digest(run: Path) -> str:
    return hashlib.sha256((run / "adapter/adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """Losses and adapter of the run that nothing interrupted."""
    run = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_train_align, "report_alignment", lambda *args: None)
        assert main(["train", str(config), "--run", str(run)]) == 0
    assert len(losses(run)) == STEPS
    return losses(run), adapter_digest(run)


def assert_resumes(run: Path, whole: tuple[Any, str]) -> None:
    assert main(["train", "--resume", "--run", str(run)]) == 0
    assert (losses(run), adapter_digest(run)) == whole


@pytest.mark.parametrize("step", range(1, STEPS))
def test_signal_after_any_step(
    step: int,
    config: Path,
    whole: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    number = signal.SIGINT if step % 2 else signal.SIGTERM
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "append", at_step(step, lambda: signal.raise_signal(number)))
        assert main(["train", str(config), "--run", str(run)]) == 128 + number
    assert f"resume with: tli-engine train --resume --run {run}" in capsys.readouterr().err
    assert (run / f"checkpoints/step-{step:06d}/manifest.json").is_file()
    assert_resumes(run, whole)


class PowerCutError(Exception):
    """The process is gone: no handler runs, nothing is kept."""


def cut() -> None:
    raise PowerCutError


def train_until_cut(config: Path, run: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "append", at_step(step, cut))
        with pytest.raises(PowerCutError):
            main(["train", str(config), "--run", str(run)])


@pytest.mark.parametrize("step", [2, 5, 7, 11, 19])
def test_crash_goes_on_from_the_last_checkpoint(
    step: int, config: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    train_until_cut(config, run, step, monkeypatch)
    # the last line was being written
    with (run / "metrics.jsonl").open("a") as f:
        f.write('{"step": ')
    assert_resumes(run, whole)


def test_interrupted_twice(
    config: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    for step, command in ((4, [str(config)]), (13, ["--resume"])):
        with monkeypatch.context() as patch:
            stop = at_step(step)
            patch.setattr(MetricsLog, "append", stop)
            assert main(["train", *command, "--run", str(run)]) == 130
    assert_resumes(run, whole)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda c: (c / "manifest.json").unlink(), id="no-manifest"),
        pytest.param(lambda c: (c / "optimizer.safetensors").write_bytes(b""), id="truncated"),
        pytest.param(lambda c: (c / "state.json").unlink(), id="missing-file"),
        pytest.param(lambda c: (c / "manifest.json").write_text("{"), id="broken-manifest"),
    ],
)
def test_broken_checkpoint_is_skipped_with_its_reason(
    damage: Callable[[Path], None],
    config: Path,
    whole: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    train_until_cut(config, run, 12, monkeypatch)
    damage(run / "checkpoints/step-000010")
    assert_resumes(run, whole)
    err = capsys.readouterr().err
    assert re.search(r"checkpoint skipped: \S*step-000010", err)
    assert "resuming after step 5 of 24" in err


def test_a_state_that_is_none_is_one_line(
    config: Path,
    whole: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What the manifest calls whole and training did not write: the run goes on without it."""
    run = tmp_path / "run"
    train_until_cut(config, run, 12, monkeypatch)
    path = run / "checkpoints/step-000010"
    for text, said in (("not JSON", "Expecting value: "), ('{"best": {}}', "it has no step")):
        (path / "state.json").write_text(text)
        write_manifest(path, (p.name for p in path.iterdir() if p.name != "manifest.json"))
        capsys.readouterr()
        assert main(["train", "--resume", "--run", str(run)]) == 2
        said = f"error: {path}/state.json: is not what training wrote: {said}"
        assert said in capsys.readouterr().err.splitlines()[-1]
    path.rename(tmp_path / "away")
    assert_resumes(run, whole)


def test_a_checkpoint_that_cannot_be_read_is_one_line(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It may be whole: neither is it skipped, nor does a later one take its place."""
    from tli_engine.train import manifest

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "append", at_step(7))
        assert main(["train", str(config), "--run", str(run)]) == 130

    def fails(path: Path) -> str:
        raise OSError(5, "Input/output error")

    capsys.readouterr()
    monkeypatch.setattr(manifest, "sha256", fails)
    assert main(["train", "--resume", "--run", str(run)]) == 2
    name = "step-000007/adapter_model.safetensors"
    said = f"tli-engine: error: {run}/checkpoints/{name}: cannot be read: Input/output error"
    assert capsys.readouterr().err.splitlines() == [said]


def test_full_disk_keeps_the_earlier_checkpoint(
    config: Path,
    whole: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from tli_engine.train import checkpoint

    run, saved = tmp_path / "run", checkpoint.save_file

    def full(tensors: Any, path: Path) -> None:
        if "step-000010" in str(path):
            raise OSError(28, "No space left on device")
        saved(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        assert main(["train", str(config), "--run", str(run)]) == 2
    assert "No space left on device; earlier ones are whole" in capsys.readouterr().err
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000005"]
    assert_resumes(run, whole)


def test_a_really_full_disk_is_one_line(config: Path, tmp_path: Path) -> None:
    """safetensors has an error of its own for it, which a limit on file sizes brings out."""
    run = tmp_path / "run"
    command = f"""
import resource, sys
from tli_engine.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))
sys.exit(main(["train", {str(config)!r}, "--run", {str(run)!r}]))
"""
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("tli-engine: error: ")
    assert "cannot be written" in result.stderr
    assert not list((run / "checkpoints").iterdir())


def test_a_finished_run_is_not_trained_again(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", str(config), "--run", str(run)]) == 0
    before = (run / "metrics.jsonl").stat().st_mtime_ns
    assert main(["train", "--resume", "--run", str(run)]) == 2
    assert "has finished; measure it with tli-engine evaluate" in capsys.readouterr().err
    assert (run / "metrics.jsonl").stat().st_mtime_ns == before


def test_checkpoints_of_an_abandoned_end_do_not_push_out_the_new(
    config: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    train_until_cut(config, run, 22, monkeypatch)
    for name in ("step-000015", "step-000020"):
        (run / "checkpoints" / name / "manifest.json").unlink()
    with monkeypatch.context() as patch:
        stop = at_step(7)
        patch.setattr(MetricsLog, "append", stop)
        assert main(["train", "--resume", "--run", str(run)]) == 130
    left = {p.name for p in (run / "checkpoints").iterdir()}
    assert left == {"step-000005", "step-000007"}
    assert_resumes(run, whole)


def test_what_is_left_of_an_old_checkpoint_goes(
    config: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Power was cut while the last checkpoint, written by then, made earlier ones go."""
    run, remove = tmp_path / "run", shutil.rmtree

    def cutting(path: Path, **how: Any) -> None:
        if path.name == "step-000015" and (run / "checkpoints" / f"step-{STEPS:06d}").is_dir():
            (path / "state.json").unlink()
            raise PowerCutError
        remove(path, **how)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", cutting)
        with pytest.raises(PowerCutError):
            main(["train", str(config), "--run", str(run)])
    assert_resumes(run, whole)
    assert main(["verify", str(run)]) == 0


def test_other_pairs_are_refused(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(config.parent, folder)
    other = folder / "config.yaml"
    other.write_text(config.read_text().replace(str(config.parent), str(folder)))
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop = at_step(3)
        patch.setattr(MetricsLog, "append", stop)
        assert main(["train", str(other), "--run", str(run)]) == 130
    (folder / "pairs.json").write_text(json.dumps([{"swahili": "a", "english": "b"}] * 3))
    assert main(["train", "--resume", "--run", str(run)]) == 2
    assert "cannot resume" in capsys.readouterr().err


def test_signal_to_the_real_process(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "tli_engine", "train", str(config), "--run", str(run)]
    command += ["--set", "train.steps=1000000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        while not (run / "metrics.jsonl").is_file() or len(losses(run)) < 3:
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143
    assert f"resume with: tli-engine train --resume --run {run}" in err
