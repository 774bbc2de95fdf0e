"""A run of a comparison is made by one process at a time, and a lock ends with whoever held it."""

import errno
import fcntl
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tli_engine.cli import _compare, _compare_run
from tli_engine.cli._compare_run import Comparison
from tli_engine.cli.train import read_values
from tli_engine.config import read_yaml
from tli_engine.evaluate.compare.config import split_config

Cli = Callable[..., Any]
ROOT = Path(__file__).parents[3]
HOLDER = """
import sys, time
from pathlib import Path
from tli_engine.cli._compare_lock import held
with held(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Callable[[str], "subprocess.Popen[str]"]]:
    """Starts a process that holds the lock of a run in the folder ``out``."""
    started = []

    def start(name: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", HOLDER, str(tmp_path / "out/locks" / name)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_the_second_of_two_processes_is_told(
    cli: Cli, config: Path, tmp_path: Path, holder: Callable[[str], "subprocess.Popen[str]"]
) -> None:
    first = holder("lora-early-5")
    only = ("compare", config, "--out", "out", "--only")
    second = cli(*only, "lora-early:5")
    assert second.status == 2
    assert second.err == (
        f"tli-engine: error: out/lora-early-5: another process is making it (process {first.pid} on "
        f"{platform.node()}); wait until it has ended, or end it\n"
    )
    assert not (tmp_path / "out/lora-early-5").exists()
    # other runs are nobody's
    assert cli(*only, "base").status == 0
    # killed, it holds nothing
    first.kill()
    first.wait()
    assert (tmp_path / "out/locks/lora-early-5").is_file()
    assert cli(*only, "lora-early:5").status == 0
    # nor is one that is done locked
    holder("lora-early-5")
    assert "is done" in cli(*only, "lora-early:5").err


def test_locks_do_not_begin_a_comparison(
    cli: Cli, config: Path, holder: Callable[[str], "subprocess.Popen[str]"]
) -> None:
    """As one that failed before anything was made of it may be begun with other settings."""
    crowded = ("--set", "compare.max_new_tokens=90", "--only", "full:5")
    assert "leave no room" in cli("compare", config, "--out", "out", *crowded).err
    assert Path("out/locks/full-5").read_bytes() == b""
    assert cli("compare", config, "--out", "out", "--only", "base").status == 0


def test_a_run_that_was_made_meanwhile_is_not_made_again(
    cli: Cli, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = ("--only", "base")
    assert cli("compare", config, "--out", "made", *only).status == 0
    result = tmp_path / "out/base/result.json"
    held = _compare_run.held

    @contextmanager
    def made_elsewhere(*arguments: Any) -> Iterator[None]:
        with held(*arguments):
            shutil.copytree(tmp_path / "made/base", result.parent)
            yield

    monkeypatch.setattr(_compare_run, "held", made_elsewhere)
    found = cli("compare", config, "--out", "out", *only)
    assert (found.status, found.err) == (0, "out/base: is done\n")
    assert result.read_bytes() == (tmp_path / "made/base/result.json").read_bytes()


def test_a_file_system_without_locks_is_said(
    cli: Cli, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: Any, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    found = cli("compare", config, "--out", "out", "--only", "base")
    assert found.status == 0
    assert found.err.startswith(
        "warning: out/locks/base: cannot be locked: No locks available; see to it that no other "
        "process makes out/base\n"
    )


def test_runs_that_begin_at_the_same_time_write_the_settings_once(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both wrote into one file, and the one that was later could not give it its name."""
    written = []
    write_text = _compare.write_text

    def slowly(path: Path, text: str) -> None:
        written.append(path)
        time.sleep(0.2)
        write_text(path, text)

    monkeypatch.setattr(_compare, "write_text", slowly)
    settings = split_config(*read_values(config, None, (), "compare"))
    comparison = Comparison(*settings, tmp_path / "out")
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(_compare._keep_settings, comparison, False) for _ in range(2)]
    assert [future.result() for future in both] == [None, None]
    assert written == [tmp_path / "out/compare.yaml"]
    assert read_yaml(tmp_path / "out/compare.yaml")["compare"]["seeds"] == [5]
