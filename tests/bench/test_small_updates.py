"""The bench of small updates: what PEFT's layer rounds off and the engine's does not."""

import json
import sys
from pathlib import Path

import pytest
import torch

from bench import bench_small_updates
from bench.bench_small_updates import SIZES, kept, measure

pytest.importorskip("peft")


def test_a_layer_that_adds_in_fp64_keeps_all_of_every_update() -> None:
    torch.manual_seed(0)
    x, A, B = torch.randn(8, 16), torch.randn(4, 16), torch.randn(12, 4)
    W = torch.randn(12, 16).double()
    exact = kept(lambda B: x.double() @ (W + B.double() @ A.double()).T, x, A, B, [-20, -3])
    assert exact == pytest.approx([1.0, 1.0])
    half = kept(lambda B: x.double() @ (W + 0.5 * (B @ A).double()).T, x, A, B, [-3])
    assert half == pytest.approx([0.5], rel=1e-5)


def test_peft_rounds_small_updates_off_and_the_engine_does_not() -> None:
    found = measure(256, 256, torch.device("cpu"))
    for name, shares in found.items():
        of = dict(zip(SIZES, shares, strict=True))
        assert of[-4] == pytest.approx(1, abs=0.01), name
        if name.startswith("peft"):
            assert of[-12] < 0.25, name
            assert of[-10] < 0.7, name
        else:
            assert of[-12] == pytest.approx(1, abs=0.1), name
            assert of[-10] == pytest.approx(1, abs=0.05), name


def test_shares_are_written_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["x", "--width", "64", "--rows", "32"])
    bench_small_updates.main()
    folder = next(tmp_path.iterdir())
    found = json.loads((folder / "small_updates.json").read_text())
    assert set(found["kept"]) == {"peft", "peft:fp32-adapters", "tli-engine", "tli-engine:nf4"}
    assert all(len(shares) == len(found["sizes"]) for shares in found["kept"].values())
    assert (folder / "small_updates.png").read_bytes().startswith(b"\x89PNG")
