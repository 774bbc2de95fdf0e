"""Signals while training: which are caught, how often, and a terminal that closes."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tli_engine.cli.signals import STOPPED, stop_on_signals
from tli_engine.train.checkpoint import find_checkpoint

HANGUP = signal.SIGHUP


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_is_caught_and_hangups_after_it(number: signal.Signals) -> None:
    """A closing terminal sends several; another signal's second is as without this."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, HANGUP)}
    with stop_on_signals() as stop:
        assert not stop()
        for sent in (number, HANGUP, HANGUP):
            signal.raise_signal(sent)
        assert stop.exit_status == 128 + number
        assert stop.exit_status in STOPPED
        assert signal.getsignal(signal.SIGINT) == before[signal.SIGINT]
        assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]
    assert {s: signal.getsignal(s) for s in before} == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_what_is_ignored_stays_so(number: signal.Signals) -> None:
    """As nohup has it, and a shell that starts a command in the background."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            signal.raise_signal(number)
            assert not stop()
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.skipif(sys.platform != "linux", reason="a terminal as Linux closes it")
def test_a_terminal_that_closes_stops_the_run(config_file: Path, tmp_path: Path) -> None:
    """With a checkpoint, although what the command prints has nowhere to go."""
    import fcntl
    import pty
    import termios

    values = yaml.safe_load(config_file.read_text())
    values["train"] |= {"epochs": 100_000, "checkpoint_steps": 10**6}
    path, run = tmp_path / "long.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(values))
    root = str(Path(__file__).parents[2])
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "tli_engine", "train", str(path), "--run", str(run)],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )
    os.close(slave)
    os.set_blocking(master, False)
    try:
        metrics, shown = run / "metrics.jsonl", b""
        while not metrics.is_file() or metrics.read_text().count("\n") < 50:
            assert process.poll() is None, shown
            with contextlib.suppress(BlockingIOError):
                shown += os.read(master, 65536)
            time.sleep(0.05)
        os.close(master)
        assert process.wait(60) == 128 + HANGUP
    finally:
        process.kill()
        process.wait()
    # there was a bar
    assert "━".encode() in shown
    found = find_checkpoint(run)
    assert found.path is not None
    assert found.path.name == f"step-{metrics.read_text().count(chr(10)):06d}"
