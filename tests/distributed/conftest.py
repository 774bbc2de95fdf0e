"""Several processes on this machine's CPU, as torchrun starts them."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tli_engine.testing import save_tiny_model

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
Ranks = Callable[..., list[dict[str, str]]]


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Of processes that find this package, one thread each, and ask no hub."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # a run must not be taken for one of several because this one is
    inherited = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK")}
    return inherited | own


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    def port() -> int:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            return int(s.getsockname()[1])

    return port


@pytest.fixture(scope="session")
def ranks(
    tmp_path_factory: pytest.TempPathFactory,
    environment: dict[str, str],
    free_port: Callable[[], int],
) -> Ranks:
    """Run groups of the checks of ``on_ranks.py``; what came of each, rank by rank."""

    def run(size: int, groups: str, folder: Path) -> list[dict[str, str]]:
        reports = tmp_path_factory.mktemp("ranks")
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        processes = []
        for rank in range(size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
            command = [sys.executable, str(HERE / "on_ranks.py"), groups, str(folder), str(reports)]
            env = environment | address | own
            processes.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
        try:
            for process in processes:
                _, errors = process.communicate(timeout=240)
                assert process.returncode == 0, errors
        finally:
            for process in processes:
                process.kill()
        return [json.loads((reports / f"{rank}.json").read_text()) for rank in range(size)]

    return run


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama")
    # read by the checks beside the model
    (folder / "shards").mkdir()
    for family in ("qwen2", "gemma3_text"):
        save_tiny_model(folder / "families" / family, family)
    return folder


@pytest.fixture
def ended(environment: dict[str, str]) -> Iterator[Callable[..., Any]]:
    """Start commands whose processes are gone after the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*command: object, **more: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            list(map(str, command)),
            env=environment | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        # its own processes go with it, if it is asked
        process.terminate()
        try:
            process.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
