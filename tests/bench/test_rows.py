"""The benches of the step and of the scan, from providers to rows, on a tiny model."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import bench_tli_scan, bench_tli_step
from bench.engine import NF4_BYTES, scan_floor
from bench.harness import Row
from bench.models import Subject

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")


Make = Callable[..., Subject]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Steps that were traced, each as 2 ms in 7 kernels."""
    found: list[Any] = []

    def trace(step: Callable[[], float]) -> tuple[float, int]:
        found.append(step)
        return 2.0, 7

    monkeypatch.setattr(bench_tli_step, "gpu_busy", trace)
    return found


@pytest.fixture
def traced_scan(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the scan's bench traced, each as 3 ms in 5 kernels."""
    found: list[Any] = []

    def trace(call: Callable[[], object], calls: int) -> tuple[float, int]:
        assert calls == 1
        found.append(call())
        return 3.0, 5

    monkeypatch.setattr(bench_tli_scan, "gpu_busy", trace)
    return found


def test_step_of_every_provider(tiny_subject: Make, traced: list[Any]) -> None:
    # a floor of bytes alone: 1 byte a second
    rows = bench_tli_step.bench_case(tiny_subject(nf4=True), 4, 2, speed=(1.0, 1e30))
    ours = ["tli-engine", "tli-engine:fused"]
    assert [row.provider for row in rows] == ["published", "peft+bitsandbytes", *ours]
    assert [row.notes["calls"] for row in rows] == [2, 8, 8, 8]
    assert rows[0].ratio_to_baseline == 1.0
    assert len(traced) == 4
    for row in rows:
        assert row.model == "tiny nf4 fp32"
        assert row.shape == {"pairs": 4, "tokens": 32, "layer": 2}
        assert (row.gpu_ms, row.notes["kernels"]) == (2.0, 7)
        assert row.bytes is not None
        assert row.roofline == pytest.approx(row.bytes / (row.ms / 1e3))


def test_step_of_the_engine_alone(tiny_subject: Make, traced: list[Any]) -> None:
    rows = bench_tli_step.bench_case(tiny_subject(nf4=True, name="qwen2-72b"), 4, 1, speed=None)
    assert [row.provider for row in rows] == ["tli-engine", "tli-engine:fused"]
    assert rows[0].ratio_to_baseline == 1.0
    assert traced == []


def test_providers_that_disagree_are_not_timed(
    tiny_subject: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(*_: Any) -> tuple[Callable[[], float], int, None]:
        return (lambda: 0.123), 1, None

    monkeypatch.setattr(bench_tli_step, "engine_step", other)
    with pytest.raises(SystemExit, match="the first losses differ"):
        bench_tli_step.bench_case(tiny_subject(), 4, 1, speed=None)


def test_rows_of_a_batch_take_the_place_of_earlier_ones() -> None:
    def row(case: str, model: str, pairs: int, provider: str) -> Row:
        return Row(case, {"pairs": pairs}, model, provider, 1.0, 1.0, 1.0, 1.0)

    earlier = [row("step", "a", 8, "x"), row("step", "a", 32, "x"), row("training", "a", 8, "x")]
    again = [row("step", "a", 8, "y"), row("step", "a", 8, "z")]
    assert bench_tli_step.replaced(earlier, again) == [*again, *earlier[1:]]
    other = [row("step", "b", 8, "x")]
    assert bench_tli_step.replaced(earlier, other) == [*earlier, *other]


def test_whole_training(tiny_subject: Make) -> None:
    subject = tiny_subject(nf4=True)
    config = subject.config
    short = config.train.model_copy(update={"steps": 3, "epochs": None})
    row = bench_tli_step.bench_training(
        replace(subject, config=config.model_copy(update={"train": short}))
    )
    assert (row.case, row.provider) == ("training", "tli-engine")
    assert row.shape == {"pairs": 623, "steps": 3, "layer": 2}
    # the second run's time; building and capturing are noted beside it
    assert row.ms > 0
    assert row.notes["first_run_s"] > 0


def test_scan_and_evaluation(tiny_subject: Make, traced_scan: list[Any]) -> None:
    rows = bench_tli_scan.bench_subject(tiny_subject(), sample=1, rounds=1, speed=None)
    assert [(row.case, row.provider) for row in rows] == [
        (case, provider)
        for case, providers in (
            ("scan", ("published", "tli-engine", "tli-engine:forward")),
            ("evaluate", ("published", "tli-engine")),
        )
        for provider in providers
    ]
    assert rows[0].shape == {"pairs": 623, "layers": 4}
    assert rows[3].shape == {"pairs": 686, "layer": 2}
    assert rows[0].notes == {"calls": 1, "scaled_by": 623}
    assert rows[3].notes == {"calls": 1, "scaled_by": 686 / 6}
    assert rows[1].ratio_to_baseline == pytest.approx(rows[0].ms / rows[1].ms)
    # without a GPU nothing is traced
    assert traced_scan == []
    assert {(row.gpu_ms, row.peak_mib, row.roofline) for row in rows} == {(None, None, None)}


def test_scan_and_evaluation_are_traced_beside_a_floor(
    tiny_subject: Make, traced_scan: list[Any]
) -> None:
    # a floor of operations alone: one a second
    rows = bench_tli_scan.bench_subject(tiny_subject(), sample=2, rounds=1, speed=(1e30, 1.0))
    scan, evaluation = rows[:3], rows[3:]
    # of the published scan a pair is traced at one of four layers, of the evaluation a pair
    assert [len(part) for part in (traced_scan[0], traced_scan[3])] == [1, 1]
    ours = [3.0, 3.0]
    assert [row.gpu_ms for row in scan] == pytest.approx([3.0 * 623 * 4, *ours])
    assert [row.gpu_ms for row in evaluation] == pytest.approx([3.0 * 686, *ours[:1]])
    assert [row.notes["kernels"] for row in rows] == [5 * 623 * 4, 5, 5, 5 * 686, 5]
    for row in scan:
        assert row.flops is not None
        assert row.roofline == pytest.approx(row.flops / (row.ms / 1e3))
    assert [row.roofline for row in evaluation] == [None, None]


@pytest.mark.parametrize("nf4", [False, True])
def test_floor_of_the_scan(tiny_subject: Make, nf4: bool) -> None:
    subject = tiny_subject(nf4=nf4)
    words = set(subject.splits[0].words)
    floor = scan_floor(subject)
    # of the same shape; in NF4 they are no parameters
    blocks = tiny_subject().early(4).blocks
    weights = sum(p.numel() for p in blocks.parameters() if p.ndim > 1)
    assert floor.bytes == pytest.approx(weights * (NF4_BYTES if nf4 else 4))
    assert floor.flops == 2 * weights * sum(len(word) for word in words)


def test_many_words_are_a_row(tiny_subject: Make) -> None:
    row = bench_tli_scan.scan_many(tiny_subject(), 40)
    assert (row.case, row.provider) == ("many", "tli-engine")
    assert row.shape == {"pairs": 40, "words": 80, "layers": 4}
    assert row.ms > 0
    # of the process, where there is no GPU
    assert row.peak_mib == pytest.approx(row.notes["host_mib"], rel=0.01)


def test_many_words_have_a_file_of_their_own(
    tiny_subject: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(bench_tli_scan, "find", lambda name, device: tiny_subject())
    monkeypatch.setattr("sys.argv", ["tli_scan", "--many", "40"])
    bench_tli_scan.main()
    (path,) = tmp_path.rglob("*.json")
    assert path.name == "tli_scan_many.json"
    (row,) = json.loads(path.read_text())["rows"]
    assert row["shape"]["words"] == 80
