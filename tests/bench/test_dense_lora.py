"""The bench of dense layers with adapters, from providers to rows, on a tiny shape."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import bench_dense_lora_linear as bench
from bench.harness import Row

pytest.importorskip("peft")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a test on a GPU has it there")


def test_rows_of_every_provider() -> None:
    rows = bench.bench_shape("tiny", 48, 32, [5], rounds=2)
    names = ["peft", "torch", "frozen", "tli-engine"]
    assert [(row.case, row.provider) for row in rows] == [
        (case, name) for case in ("fwd", "fwd_bwd") for name in names
    ]
    for row in rows:
        assert row.model == "tiny"
        assert row.shape == {"M": 5, "N": 48, "K": 32, "r": 16}
        base = next(r for r in rows if (r.case, r.provider) == (row.case, "peft"))
        assert row.ratio_to_baseline == pytest.approx(base.ms / row.ms)
        frozen = next(r for r in rows if (r.case, r.provider) == (row.case, "frozen"))
        added = {} if row is frozen else {"over_frozen": pytest.approx(row.ms / frozen.ms - 1)}
        assert row.notes == added


@pytest.mark.parametrize("wrong", ["tli-engine", "torch"])
def test_a_provider_that_errs_is_not_timed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = bench.providers

    def erring(weights: Sequence[Tensor], M: int) -> dict[str, Any]:
        found = plain(weights, M)
        call, inputs = found[wrong][0]
        # a hundredth more than it is
        return found | {wrong: [(lambda x: 1.01 * call(x), inputs)]}

    monkeypatch.setattr(bench, "providers", erring)
    with pytest.raises(SystemExit, match=f"{wrong} tiny M=5 y: relative error .*; not timed"):
        bench.bench_shape("tiny", 48, 32, [5], rounds=2)


def test_what_a_cpu_measures_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[Any, ...]] = []

    def shape(*args: Any) -> list[Row]:
        measured.append(args)
        return [Row("fwd", {}, args[0], "peft", 1.0, 1.0, 1.0, 1.0)]

    def write(op: str, rows: list[Row], peers: Sequence[str]) -> Path:
        assert (op, peers) == ("dense_lora_linear", ["peft"])
        assert [row.model for row in rows] == [name for name, *_ in measured]
        return Path("results")

    monkeypatch.setattr(bench, "bench_shape", shape)
    monkeypatch.setattr(bench, "write_results", write)
    monkeypatch.setattr(sys, "argv", ["bench", "--m", "3"])
    bench.main()
    # an eighth of the 8B shape's sides
    assert measured == [
        ("small-qkv", 768, 512, [3]),
        ("small-o", 512, 512, [3]),
        ("small-gate-up", 3584, 512, [3]),
        ("small-down", 512, 1792, [3]),
    ]
