"""``tli-engine train`` in several processes: started, stopped, resumed, and when one of them fails."""

import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tli_engine.cli import main
from tli_engine.train.checkpoint import find_checkpoint
from tli_engine.train.manifest import problems

HERE = Path(__file__).parent
Ended = Callable[..., Any]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
TLI_ENGINE = (sys.executable, "-m", "tli_engine")


@pytest.fixture(autouse=True)
def _one_thread_and_no_plots(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLI_ENGINE_DEBUG", "")
    monkeypatch.setattr(
        "tli_engine.cli._train_sft.plot_losses", lambda steps, before, path: path.write_bytes(b"")
    )


@pytest.fixture
def config(tmp_path: Path, model_folder: Path) -> Callable[..., Path]:
    """A run of fine-tuning on eleven articles, three rows a step."""
    articles = [{"text": "habari " * (i % 5 + 1), "summary": "x" * (i % 4 + 2)} for i in range(11)]
    lines = [json.dumps(article) + "\n" for article in articles]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    (tmp_path / "unseen.jsonl").write_text("".join(lines[:3]))

    def write(**changes: Any) -> Path:
        values: dict[str, Any] = {
            "model": str(model_folder), "objective": "sft", "device": "cpu",
            "data": {
                "texts": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "unseen.jsonl")
            },
            "prompt": {"instruction": "Fupisha: {text}"},
            "lora": {"layers": "0-3", "r": 4, "alpha": 8},
            "sft": {"context": 64, "packing": False, "evaluate_steps": 1000},
            "train": {
                "steps": 7, "batch_size": 3, "learning_rate": 1e-2, "checkpoint_steps": 2,
            },
            "distributed": {"timeout": 60},
        }  # fmt: skip
        for section, change in changes.items():
            old = values.get(section)
            values[section] = old | change if isinstance(old, dict) else change
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def same_result(actual: Path, expected: Path) -> None:
    assert not problems(actual)
    torch.testing.assert_close(
        torch.tensor(losses(actual)), torch.tensor(losses(expected)), rtol=0, atol=1e-5
    )
    found = adapter(actual)
    for name, tensor in adapter(expected).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)


def test_gpus_starts_as_many_processes(
    config: Callable[..., Path], tmp_path: Path, ended: Ended
) -> None:
    """The result of one process; what is said is said once."""
    path, one, two = config(), tmp_path / "one", tmp_path / "two"
    process = ended(*TLI_ENGINE, "train", path, "--run", two, "--gpus", 2)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert main(["train", str(path), "--run", str(one)]) == 0
    same_result(two, one)
    assert len(re.findall("loss on 3 unseen articles", out)) == 1
    assert len(re.findall("trained 7 steps", err)) == 1
    assert sorted(p.name for p in two.iterdir()) == sorted(p.name for p in one.iterdir())


def test_two_nodes_on_the_loopback(
    config: Callable[..., Path], tmp_path: Path, ended: Ended, free_port: Callable[[], int]
) -> None:
    """The same command on each, as docs/several-gpus.md has it."""
    path, one, two = config(), tmp_path / "one", tmp_path / "two"
    place = f"127.0.0.1:{free_port()}"
    nodes = [
        ended(
            *TORCHRUN, "--nnodes", 2, "--nproc-per-node", 1,
            "--rdzv-backend", "c10d", "--rdzv-endpoint", place, "--rdzv-id", "test",
            "--local-addr", "127.0.0.1", "-m", "tli_engine", "train", path, "--run-folder", two,
        )
        for _ in range(2)
    ]  # fmt: skip
    for node in nodes:
        _, err = node.communicate(timeout=100)
        assert node.returncode == 0, err
        assert "will be ignored" not in err
    assert main(["train", str(path), "--run", str(one)]) == 0
    same_result(two, one)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [pytest.param("modules", marks=pytest.mark.long), "fused"])
def test_full_fine_tuning_is_resumed_and_written(
    engine: str, config: Callable[..., Path], tmp_path: Path, ended: Ended
) -> None:
    """By FSDP2: the model is that of one process, also where the last step had to be run again."""
    train = {"learning_rate": 1e-3, "engine": engine}
    path, one, two = config(method="full", train=train), tmp_path / "one", tmp_path / "two"
    models = []
    for options in (("train", path, "--run", two), ("train", "--resume", "--run", two)):
        process = ended(*TLI_ENGINE, *options, "--gpus", 2)
        _, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
        assert err.count("blocks stay gathered until their way back: 0.0 GiB a GPU") == 1
        models.append(load_file(two / "model" / "model.safetensors"))
        # as if it had been killed in its last step
        (two / "manifest.json").unlink()
        shutil.rmtree(two / "checkpoints" / "step-000007")
    assert "resuming after step 6 of 7" in err
    assert main(["train", str(path), "--run", str(one)]) == 0
    expected = load_file(one / "model" / "model.safetensors")
    for found in models:
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)


def wait_for_steps(process: Any, run: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if (run / "metrics.jsonl").is_file() and len(losses(run)) >= count:
            return
        time.sleep(0.05)
    pytest.fail(f"no {count} steps: {process.communicate(timeout=5)[1]}")


def test_a_signal_stops_all_and_one_process_goes_on(
    config: Callable[..., Path], tmp_path: Path, ended: Ended, capfd: pytest.CaptureFixture[str]
) -> None:
    """After the same step: the run that is resumed is the one that was never stopped."""
    path = config(train={"steps": 150, "checkpoint_steps": 1000})
    one, two = tmp_path / "one", tmp_path / "two"
    process = ended(*TLI_ENGINE, "train", path, "--run", two, "--gpus", 2)
    wait_for_steps(process, two, 5)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert f"train --resume --run {two} --gpus 2" in err
    found = find_checkpoint(two)
    assert found.path is not None
    assert not problems(found.path)
    stopped = len(losses(two))
    assert found.path.name == f"step-{stopped:06d}"
    assert 5 <= stopped < 150
    assert main(["train", "--resume", "--run", str(two)]) == 0
    assert f"resuming after step {stopped} of 150" in capfd.readouterr().err
    assert main(["train", str(path), "--run", str(one)]) == 0
    assert not problems(two)
    torch.testing.assert_close(
        torch.tensor(losses(two)), torch.tensor(losses(one)), rtol=1e-3, atol=1e-3
    )


@pytest.mark.long
def test_what_torchrun_started_goes_on_by_torchrun(
    config: Callable[..., Path], tmp_path: Path, ended: Ended
) -> None:
    """The line that says how is the command."""
    path, run = config(train={"steps": 60, "checkpoint_steps": 1000}), tmp_path / "a run"
    command = ("--nproc-per-node", 2, "-m", "tli_engine", "train", path, "--run-folder", run)
    process = ended(*TORCHRUN, *command)
    wait_for_steps(process, run, 3)
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=60)
    (said,) = (line for line in err.splitlines() if line.startswith("resume with: torchrun "))
    again = shlex.split(said.removeprefix("resume with: torchrun "))
    process = ended(*TORCHRUN, *again)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert "resuming after step" in err
    assert len(losses(run)) == 60


def test_a_terminal_that_closes_stops_all(
    config: Callable[..., Path], tmp_path: Path, ended: Ended
) -> None:
    """It sends SIGHUP more than once."""
    path, run = config(train={"steps": 3000, "checkpoint_steps": 5000}), tmp_path / "run"
    process = ended(*TLI_ENGINE, "train", path, "--run", run, "--gpus", 2)
    wait_for_steps(process, run, 3)
    for _ in range(3):
        process.send_signal(signal.SIGHUP)
        time.sleep(0.02)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGHUP
    assert f"train --resume --run {run} --gpus 2" in err
    found = find_checkpoint(run).path
    assert found is not None
    assert found.name == f"step-{len(losses(run)):06d}"


@pytest.mark.long
def test_signals_that_were_ignored_are_ignored_by_all(
    config: Callable[..., Path], tmp_path: Path, ended: Ended
) -> None:
    """As nohup has it, and a shell that starts a command in the background."""
    path, run = config(train={"steps": 3000, "checkpoint_steps": 5000}), tmp_path / "run"
    command = (*TLI_ENGINE, "train", path, "--run", run, "--gpus", 2)
    process = ended("sh", "-c", "trap '' HUP INT; exec \"$@\"", "sh", *command)
    wait_for_steps(process, run, 3)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGINT)
    wait_for_steps(process, run, len(losses(run)) + 10)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert find_checkpoint(run).path is not None


def rank_of(process: Any, number: int) -> int:
    """The process that ``--gpus`` started for a rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        said = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={number}".encode() in said:
            return int(child)
    pytest.fail(f"no rank {number} among {children}")


def is_running(number: int) -> bool:
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    # ended, and nobody has asked for its status
    return state != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_a_killed_rank_is_told_with_how_to_go_on(
    config: Callable[..., Path], tmp_path: Path, ended: Ended
) -> None:
    path, run = config(train={"steps": 1000, "checkpoint_steps": 2}), tmp_path / "run"
    process = ended(*TLI_ENGINE, "train", path, "--run", run, "--gpus", 2)
    wait_for_steps(process, run, 3)
    os.kill(rank_of(process, 1), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    again = f"tli-engine train --resume --run {run} --gpus 2"
    assert err.splitlines()[-1] == f"a process was killed by signal 9; resume with: {again}"
    assert find_checkpoint(run).path is not None


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_ranks_end_when_what_started_them_is_killed(
    config: Callable[..., Path], tmp_path: Path, ended: Ended
) -> None:
    """Though what they meet at is gone with it."""
    path, run = config(train={"steps": 3000, "checkpoint_steps": 5000}), tmp_path / "run"
    process = ended(*TLI_ENGINE, "train", path, "--run", run, "--gpus", 2)
    wait_for_steps(process, run, 3)
    ranks = [rank_of(process, number) for number in range(2)]
    process.kill()
    # its pipes are open as long as they are
    process.communicate(timeout=60)
    deadline = time.monotonic() + 10
    while any(map(is_running, ranks)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, ranks))
    assert len(losses(run)) < 3000
    # one that they could still write is whole
    assert find_checkpoint(run).skipped == []


@pytest.mark.parametrize(
    "kind", ["raises", "killed", pytest.param("hangs", marks=pytest.mark.long)]
)
def test_a_rank_that_fails_ends_the_job(
    kind: str, config: Callable[..., Path], tmp_path: Path, ended: Ended
) -> None:
    """Within the timeout, its own error first; the last checkpoint is whole."""
    path, run = config(distributed={"timeout": 4}, train={"steps": 100}), tmp_path / "run"
    command = (HERE / "run_with_fault.py", kind, "train", path, "--run-folder", run)
    process = ended(*TORCHRUN, "--standalone", "--nproc-per-node", 2, *command)
    wait_for_steps(process, run, 5)
    start = time.monotonic()
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1
    # the timeout, what a process waits before it ends for another's error, what torchrun gives one
    # that does not end when it is asked to
    grace = 30 if kind == "hangs" else 0
    assert time.monotonic() - start < 4 + 5 + grace + 6
    lines = err.splitlines()
    if kind == "raises":
        first = next(i for i, line in enumerate(lines) if "Traceback" in line)
        assert lines[first].startswith("rank 1: Traceback")
        own = [line for line in lines if line.startswith("rank 1: ")]
        assert own[-1] == "rank 1: ValueError: a fault of rank 1"
        assert not any(line.startswith("rank 0: Traceback") for line in lines)
    found = find_checkpoint(run)
    assert found.path is not None
    assert (found.path.name, found.skipped) == ("step-000004", [])


def test_a_mistake_is_told_once(config: Callable[..., Path], tmp_path: Path, ended: Ended) -> None:
    path = config(lora={"layers": "0-9"})
    process = ended(*TLI_ENGINE, "train", path, "--run", tmp_path / "run", "--gpus", 2)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2
    assert err.count("lora.layers: the model has blocks 0-3, none 9") == 1
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_says_so_once(
    config: Callable[..., Path], tmp_path: Path, ended: Ended
) -> None:
    """Unseen articles of all ranks come to one loss, which all see."""
    path = config(train={"learning_rate": 1e30, "steps": 1})
    process = ended(*TLI_ENGINE, "train", path, "--run", tmp_path / "run", "--gpus", 2)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1
    assert err.count("step 1: the loss on unseen articles is ") == 1
    assert "there is no checkpoint yet" in err
    assert "Traceback" not in err
    assert not (tmp_path / "run/adapter").exists()
