"""What is refused before processes train together, said in one line."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

from tli_engine.cli import main
from tli_engine.config import RunConfig
from tli_engine.distributed import launch
from tli_engine.distributed.world import ALONE, World
from tli_engine.errors import UserError
from tli_engine.train.sft_distribute import check_distributed

ONE_OF_TWO = {
    "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}  # fmt: skip
SHORT_OF_PATIENCE = [
    "train", "--recipe", "demo", "--set", "device=cpu", "--set", "distributed.timeout=1",
]  # fmt: skip


def test_alone_nothing_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with launch.joined("auto", 10) as (world, device):
        assert (world, device) == (ALONE, "auto")
    assert not dist.is_initialized()


def test_of_one_process_the_rank_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters number their jobs by it."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "3")
    assert launch.world_size() == 1
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launch.world_size() == 1


def test_too_few_gpus_are_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main(["train", "--recipe", "demo", "--run", str(tmp_path / "run"), "--gpus", "2"]) == 2
    assert "2 processes need 2 GPUs and 1 are here" in capfd.readouterr().err


def test_gpus_is_not_for_one_of_several(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "--recipe", "demo", "--gpus", "2"]) == 2
    assert "torchrun has started this one" in capfd.readouterr().err


def test_only_training_is_for_several(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    assert main(["compare", "--recipe", "compare-demo"]) == 2
    assert "compare takes one process; start it without torchrun" in capfd.readouterr().err
    assert main(["train", "--recipe", "demo", "--print-config"]) == 0


def test_a_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    sizes = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "3"}
    for name, value in (place | sizes).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    with pytest.raises(UserError, match="4 processes need 4 GPUs and 3"), launch.joined("cuda", 10):
        pass


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE=2 in the environment says that this is one of 2 processes, and RANK, "
            "LOCAL_RANK, MASTER_ADDR, MASTER_PORT do not say which: start them by torchrun or by "
            "--gpus, or unset WORLD_SIZE to train in one",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
            "2 processes, and LOCAL_RANK do not say which",
        ),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment is no number of processes"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 in the environment is no number of processes"),
        (ONE_OF_TWO | {"RANK": "2"}, "RANK=2 in the environment is none of 2 processes"),
        (
            ONE_OF_TWO | {"LOCAL_RANK": "x"},
            "LOCAL_RANK=x in the environment is none of 2 processes",
        ),
        (
            ONE_OF_TWO | {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "1"},
            "LOCAL_RANK=1 in the environment is none of 1 processes",
        ),
        (
            ONE_OF_TWO | {"LOCAL_WORLD_SIZE": "3"},
            "LOCAL_WORLD_SIZE=3 in the environment is no number of processes of this machine, of 2 in all",
        ),
        (
            ONE_OF_TWO | {"MASTER_PORT": "http"},
            "rank 0 of 2 cannot meet the others at 127.0.0.1:http: ",
        ),
        (
            ONE_OF_TWO | {"MASTER_PORT": "99999"},
            "rank 0 of 2 cannot meet the others at 127.0.0.1:99999: port must have value from 0 to ",
        ),
    ],
    ids=[
        "alone",
        "no local rank",
        "no number",
        "nobody",
        "no rank of them",
        "no number here",
        "none of this machine",
        "more here than in all",
        "no port",
        "no such port",
    ],
)
def test_an_environment_that_cannot_be_is_told(
    said: dict[str, str],
    message: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert main([*SHORT_OF_PATIENCE, "--run", str(tmp_path / "run")]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert "start all of them, unless" not in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("rank", "reason"),
    [
        ("0", "1/2 clients joined"),
        # a stack of C++ goes with it
        ("1", "The client socket has timed out after 1000ms while trying to connect to "),
    ],
)
def test_a_process_that_does_not_come_is_told(
    rank: str,
    reason: str,
    tmp_path: Path,
    free_port: Callable[[], int],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port = str(free_port())
    for name, value in (ONE_OF_TWO | {"MASTER_PORT": port, "RANK": rank}).items():
        monkeypatch.setenv(name, value)
    assert main([*SHORT_OF_PATIENCE, "--run", str(tmp_path / "run")]) == 2
    error = capfd.readouterr().err
    assert f"rank {rank} of 2 did not meet the others at 127.0.0.1:{port} within 1 s" in error
    assert reason in error
    assert error.endswith("; start all of them, unless one has ended with an error\n")
    assert len(error.splitlines()) == 1
    assert not dist.is_initialized()


def test_what_is_logged_until_all_are_there_is_shown(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless a line says what went wrong, and no traceback is asked for."""

    def log(line: str, error: Exception | None = None) -> None:
        with launch._torch_unheard():
            os.write(2, line.encode())
            if error is not None:
                raise error

    log("a warning\n")
    with pytest.raises(RuntimeError):
        log("a fault\n", RuntimeError())
    with pytest.raises(UserError):
        log("a stack\n", UserError())
    monkeypatch.setenv("TLI_ENGINE_DEBUG", "1")
    with pytest.raises(UserError):
        log("a stack to look at\n", UserError())
    assert capfd.readouterr().err == "a warning\na fault\na stack to look at\n"


def test_no_nccl_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with pytest.raises(UserError, match="built without NCCL"):
        launch.check_backends(on_gpu=True)
    launch.check_backends(on_gpu=False)


def test_the_docs_say_what_torchrun_takes() -> None:
    """Machines that find one another by c10d have no number: torchrun warns that it is ignored."""
    docs = (Path(__file__).parents[2] / "docs" / "several-gpus.md").read_text()
    commands = [line for line in docs.splitlines() if "--rdzv-backend c10d" in line]
    assert commands
    assert not any("--node-rank" in command for command in commands)


def test_as_many_processes_as_were_promised() -> None:
    launch.check_promised(2, "2")
    launch.check_promised(2, None)
    with pytest.raises(UserError, match="--gpus 2 was asked for, and this is one of 1"):
        launch.check_promised(1, "2")


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer"), True),
        (dist.DistBackendError("NCCL error: remote process exited"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("gloo"), False),
    ],
)
def test_a_lost_partner_is_told_from_an_own_error(error: Exception, lost: bool) -> None:
    assert launch.is_lost_partner(error) is lost


def config_of(**changes: Any) -> RunConfig:
    values = {"model": "m", "objective": "sft", "data": "a.jsonl"} | changes
    return RunConfig.model_validate(values)


SHARDED = {"weights": "sharded"}


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({"distributed": SHARDED}, 1, "there is one process"),
        ({"distributed": SHARDED, "method": "full"}, 2, "is sharded anyhow"),
        ({"distributed": SHARDED, "objective": "joint"}, 2, "objective joint"),
        ({"distributed": SHARDED, "objective": "align"}, 2, "objective align"),
        ({"distributed": {"offload": True}, "objective": "align"}, 2, "goes with method: full"),
        ({"distributed": SHARDED, "weight_residency": "bf16"}, 2, "weight_residency: nf4"),
        ({"distributed": SHARDED, "sft": {"activations": "save"}}, 2, "recompute, or auto"),
        ({"distributed": {"offload": True}}, 2, "goes with method: full on several GPUs"),
        ({"distributed": {"offload": True}, "method": "full"}, 1, "adamw-paged"),
        ({"method": "full", "train": {"optimizer": "adamw-8bit"}}, 2, "adamw-8bit"),
        ({"method": "full", "train": {"rounding": "stochastic"}}, 2, "stochastic"),
        ({"method": "full", "train": {"in_backward": True}}, 2, "in_backward"),
        (
            {"method": "lora", "train": {"in_backward": True}},
            2,
            "in_backward: gradients are summed",
        ),
        ({"method": "full", "objective": "joint"}, 2, "objective joint"),
    ],
)
def test_what_several_processes_cannot_do(changes: dict[str, Any], size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_distributed(config_of(**changes), World(0, size))


@pytest.mark.parametrize(
    ("changes", "size"),
    [({}, 1), ({}, 8), ({"method": "full"}, 2), ({"distributed": SHARDED}, 2),
     ({"method": "full", "train": {"engine": "fused"}}, 2),
     ({"method": "full", "distributed": {"offload": True}}, 2)],
)  # fmt: skip
def test_what_they_can(changes: dict[str, Any], size: int) -> None:
    check_distributed(config_of(**changes), World(0, size))


def test_resume_takes_gpus_and_nothing_else(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    (tmp_path / "config.yaml").write_text("model: m\ndevice: cpu\n")

    def start(processes: int, arguments: Any, *, on_cpu: bool) -> int:
        started.append((processes, tuple(arguments), on_cpu))
        return 0

    monkeypatch.setattr(launch, "start", start)
    assert main(["train", "--resume", "--run", str(tmp_path), "--gpus", "2"]) == 0
    assert started == [(2, ("train", "--resume", "--run", str(tmp_path)), True)]
    assert main(["train", "--resume", "--run", str(tmp_path), "--overwrite"]) == 2
    assert "--resume goes with --run DIR, and --gpus, alone" in capfd.readouterr().err
    assert main(["train", "--resume", "--gpus", "2"]) == 2
    assert "--resume needs --run DIR" in capfd.readouterr().err


def test_options_reach_the_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[tuple[str, ...]] = []
    record: Callable[..., int] = lambda n, arguments, on_cpu: started.append(tuple(arguments)) or 0  # type: ignore[func-returns-value]  # noqa: E731
    monkeypatch.setattr(launch, "start", record)
    options = ["--recipe", "demo", "--set", "train.steps=3", "--run", str(tmp_path / "r")]
    assert main(["train", *options, "--overwrite", "--gpus", "2"]) == 0
    assert started == [("train", *options[:-2], "--overwrite", *options[-2:])]
    # a folder that is not named is the same for all
    assert main(["train", "--recipe", "demo", "--gpus", "2"]) == 0
    *_, option, folder = started[-1]
    assert option == "--run"
    assert folder.startswith("runs/demo-")


@pytest.mark.parametrize(
    ("status", "has_begun", "said"),
    [
        (
            137,
            True,
            "a process was killed by signal 9; resume with: tli-engine train --resume --run ",
        ),
        (137, False, "a process was killed by signal 9 before the run began"),
        # processes that were asked to stop have said it, and an error is no reason to go on
        (143, True, ""),
        (1, True, ""),
        (2, False, ""),
    ],
)
def test_a_killed_process_is_told_with_how_to_go_on(
    status: int,
    has_begun: bool,
    said: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "a run"
    run.mkdir()
    (run / "config.yaml").write_text("model: m\ndevice: cpu\n")
    os.utime(run / "config.yaml", (1, 1))

    def start(*_: Any, **__: Any) -> int:
        if has_begun:
            (run / "config.yaml").touch()
        return status

    monkeypatch.setattr(launch, "start", start)
    options = ["--recipe", "demo", "--run", str(run), "--overwrite", "--gpus", "2"]
    assert main(["train", *options]) == status
    error = capfd.readouterr().err
    assert error.startswith(said) if said else not error
    assert f"--run '{run}' --gpus 2\n" in error or "resume" not in said
    os.utime(run / "config.yaml", (1, 1))
    assert main(["train", "--resume", "--run", str(run), "--gpus", "4"]) == status
    assert (f"--run '{run}' --gpus 4" in capfd.readouterr().err) == (status == 137)
