"""Runs of a comparison, each in a process of its own, one after the other or several at a time."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tli_engine.cli.console import say
from tli_engine.cli.signals import stop_on_signals

# of the output of runs that run at the same time, which would be mixed up
LOGS = "logs"
# torch's threads, and the tokenizers': each takes all cores unless it is told
_THREADS = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")
# how long runs are waited for before signals are looked at
_LOOK_EVERY = 0.2


def run_parts(out: Path, settings: Path, parts: Sequence[str], jobs: int) -> dict[str, int]:
    """Run parts, at most ``jobs`` at a time; the exit statuses of those that were begun.

    A signal is sent on to those that run, once, and none is begun after it.

    Args:
        out: Folder of the comparison.
        settings: Its configuration.
        parts: Names.
        jobs: Above 1, the output of each goes to a file in the folder's ``logs``, and each has its share
            of the cores' threads, unless the environment says how many.
    """
    waiting = list(parts)
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    statuses: dict[str, int] = {}
    told = False
    with stop_on_signals() as stop:
        try:
            while running or (waiting and stop.signal is None):
                while waiting and len(running) < jobs and stop.signal is None:
                    part = waiting.pop(0)
                    running[part] = _begin(out, settings, part, jobs), time.monotonic()
                for part, (process, start) in list(running.items()):
                    if process.poll() is not None:
                        del running[part]
                        statuses[part] = _status(process.returncode)
                        if jobs > 1:
                            seconds = time.monotonic() - start
                            say(f"{part}: exit status {statuses[part]} after {seconds:.0f} s")
                if stop.signal is not None and not told:
                    for process, _ in running.values():
                        process.send_signal(stop.signal)
                    told = True
                if running:
                    _wait(next(iter(running.values()))[0])
        except BaseException:
            for process, _ in running.values():
                process.kill()
                process.wait()
            raise
    return statuses


def file_name(name: str) -> str:
    """What a part, ``ARM:SEED``, or a trial, ``ARM@RATE``, is called among files."""
    return re.sub("[:@]", "-", name)


def _begin(out: Path, settings: Path, part: str, jobs: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "tli_engine", "compare", str(settings)]
    command += ["--out", str(out), "--side-by-side", str(jobs), "--only", part]
    # in a session of its own: Ctrl-C reaches it through us, once
    if jobs == 1:
        return subprocess.Popen(command, start_new_session=True)
    threads = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    environment = dict.fromkeys(_THREADS, threads) | os.environ
    path = out / LOGS / f"{file_name(part)}.txt"
    path.parent.mkdir(exist_ok=True)
    say(f"{part}: begins; its output goes to {path}")
    with path.open("ab") as log:
        return subprocess.Popen(
            command, start_new_session=True, stdout=log, stderr=log, env=environment
        )


def _wait(process: "subprocess.Popen[bytes]") -> None:
    try:
        process.wait(_LOOK_EVERY)
    except subprocess.TimeoutExpired:
        return


def _status(returncode: int) -> int:
    return 128 - returncode if returncode < 0 else returncode
