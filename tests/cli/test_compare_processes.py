"""Runs of a comparison in processes of their own: several at a time, and signals."""

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from tli_engine.cli._compare_processes import LOGS, run_parts


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is run in Python's place; to be written."""
    path = tmp_path / "python"
    path.touch(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(path))
    return path


def run(*parts: str, jobs: int) -> dict[str, int]:
    Path("out").mkdir(exist_ok=True)
    return run_parts(Path("out"), Path("out/compare.yaml"), parts, jobs)


def test_a_signal_reaches_the_run_once(program: Path) -> None:
    program.write_text(
        '#!/bin/sh\necho "$@" > arguments\ntrap "echo told >> signals; exit 130" INT\n'
        "while :; do sleep 0.05; done\n"
    )
    threading.Timer(0.5, signal.raise_signal, [signal.SIGINT]).start()
    # the second one is not begun
    assert run("full:0", "full:1", jobs=1) == {"full:0": 130}
    assert Path("signals").read_text() == "told\n"
    arguments = Path("arguments").read_text().split()
    assert arguments[:4] == ["-m", "tli_engine", "compare", "out/compare.yaml"]
    assert arguments[-4:] == ["--side-by-side", "1", "--only", "full:0"]


def test_so_many_run_at_a_time_and_the_next_takes_a_free_place(program: Path) -> None:
    """Each run waits for another one to be there, then says its name; the last one is alone."""
    program.write_text(
        '#!/bin/sh\nfor part; do :; done\ntouch "began-$part"\n'
        '[ "$part" = c ] && exit 3\nn=0\n'
        "while [ ! -e began-a ] || [ ! -e began-b ]; do\n"
        "  sleep 0.05; n=$((n + 1)); [ $n -gt 200 ] && exit 9\ndone\n"
        '[ -e began-c ] && exit 8\necho "I am $part"\n'
    )
    assert run("a", "b", "c", jobs=2) == {"a": 0, "b": 0, "c": 3}
    assert Path("out", LOGS, "b.txt").read_text() == "I am b\n"


def test_all_that_run_are_told(program: Path) -> None:
    program.write_text(
        '#!/bin/sh\ntrap "exit 143" TERM\ntouch began\nwhile :; do sleep 0.05; done\n'
    )
    threading.Timer(0.7, signal.raise_signal, [signal.SIGTERM]).start()
    assert run("a", "b", "c", jobs=2) == {"a": 143, "b": 143}


@pytest.mark.parametrize(("jobs", "cores", "threads"), [(2, 5, "2"), (3, 2, "1"), (1, 4, "none")])
def test_cores_are_shared_out(
    jobs: int, cores: int, threads: str, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads of several runs on the same cores wait for one another; a run alone has them all."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("RAYON_NUM_THREADS", "7")
    program.write_text('#!/bin/sh\necho "${OMP_NUM_THREADS:-none} $RAYON_NUM_THREADS" > threads\n')
    assert run("a", jobs=jobs) == {"a": 0}
    # what the user has set stands
    assert Path("threads").read_text() == f"{threads} 7\n"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("RAYON_NUM_THREADS")
    assert run("a", jobs=jobs) == {"a": 0}
    assert Path("threads").read_text() == f"3 {threads if jobs > 1 else ''}\n"
