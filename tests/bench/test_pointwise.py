"""What the benches of pointwise ops and of tiles do around the timing."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench import harness, pointwise
from bench.harness import Row, print_tiles

DESCRIPTION = "Some op against its peers.\n\nMore of it."


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[Row]]]:
    """Results that were written, without a GPU to measure a copy on."""
    found: list[tuple[str, list[Row]]] = []

    def write(op: str, rows: list[Row], peers: Sequence[str], **facts: object) -> Path:
        found.append((op, rows))
        assert facts == {"copy_bytes_per_s": 3e12}
        return Path("results")

    monkeypatch.setattr(pointwise, "copy_bandwidth", lambda: 3e12)
    monkeypatch.setattr(pointwise, "write_results", write)
    return found


def row(model: str, T: int, bandwidth: float) -> list[Row]:
    assert bandwidth == 3e12
    return [Row("fwd", {"T": T}, model, "tli-engine", 1.0, 1.0, 1.0, 1.0)]


def no_sweep(model: str, T: int) -> None:
    raise AssertionError(f"{model} at {T} tokens was not to be swept")


def test_rows_of_all_shapes_are_written(
    written: list[tuple[str, list[Row]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--tokens", "64", "256"])
    pointwise.run("op", DESCRIPTION, {"a": 1, "b": 2}, row, no_sweep)
    ((op, rows),) = written
    assert op == "op"
    assert [(r.model, r.shape["T"]) for r in rows] == [
        ("a", 64), ("a", 256), ("b", 64), ("b", 256),
    ]  # fmt: skip


def test_a_sweep_writes_nothing(
    written: list[tuple[str, list[Row]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    swept: list[tuple[str, int]] = []
    monkeypatch.setattr(sys, "argv", ["bench", "--sweep", "--shapes", "b", "--tokens", "64"])
    pointwise.run("op", DESCRIPTION, {"a": 1, "b": 2}, row, lambda *case: swept.append(case))
    assert swept == [("b", 64)]
    assert written == []


def test_tiles_are_timed_once_and_one_that_fails_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def times(calls: dict[str, list[Callable[[], object]]], *_: Any, **__: Any) -> Any:
        for call in calls[""]:
            call()
        return {"": [2e-6, 3e-6, 9e-6]}

    def launch(tile: tuple[int, int]) -> None:
        if tile == (4, 4):
            raise RuntimeError("out of registers")

    monkeypatch.setattr(harness, "time_graphs", times)
    print_tiles("fwd T=64", launch, [(1, 2), (4, 4), (1, 2)])
    assert capsys.readouterr().out.splitlines() == [
        "fwd T=64 (1, 2): 3.00 us",
        "fwd T=64 (4, 4): RuntimeError",
    ]
