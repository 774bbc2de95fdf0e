"""Goals of kernels and of the align step are judged by what was measured, not by what is printed."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.goals import judged, scan_table, step_table


@pytest.mark.parametrize(
    ("values", "goal", "at_least", "shown"),
    [
        ([1.5042], 1.5, False, "1.504"),
        ([1.50004], 1.5, False, "1.50004"),
        ([1.4958], 1.5, False, "**1.50**"),
        ([1.5], 1.5, False, "**1.50**"),
        ([1.51], 1.5, False, "1.51"),
        ([0.9961, 1.031], 1.0, True, "0.996-1.03"),
        ([1.0, 1.031], 1.0, True, "**1.00-1.03**"),
        ([1.151, 1.1539], 1.15, True, "**1.15**"),
        ([0.011, 0.0604], 0.06, False, "0.01-0.0604"),
        ([2.1, 2.3], 2.7, True, "2.10-2.30"),
        ([8070.15], 5000.0, True, "**8,070**"),
        ([4999.96], 5000.0, True, "4,999.96"),
    ],
)
def test_a_miss_is_told_before_rounding_and_shown(
    values: list[float], goal: float, at_least: bool, shown: str
) -> None:
    assert judged(values, goal, at_least) == shown


def write(folder: Path, op: str, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{op}.json").write_text(json.dumps({"rows": rows}))
    return folder


def scan_rows(**more: Any) -> list[dict[str, Any]]:
    """Of a scan and an evaluation, ``more`` in each."""
    times = {
        ("scan", "published"): 1_200_000.0,
        ("scan", "tli-engine"): 200.0,
        ("scan", "tli-engine:forward"): 160.0,
        ("evaluate", "published"): 20_000.0,
        ("evaluate", "tli-engine"): 80.0,
    }
    return [
        {
            "case": case,
            "provider": provider,
            "shape": {"pairs": 623 if case == "scan" else 686},
            "ms": ms,
            "ratio_to_baseline": times[case, "published"] / ms,
            **more,
        }
        for (case, provider), ms in times.items()
    ]


def test_scan_is_judged_with_and_without_what_earlier_rows_lack(tmp_path: Path) -> None:
    watched = {"gpu_ms": 150.0, "peak_mib": 6144.0, "roofline": 0.8}
    full = write(tmp_path / "NVIDIA-H200", "tli_scan", scan_rows(**watched))
    bare = write(tmp_path / "NVIDIA-H100", "tli_scan", scan_rows())
    lines = scan_table(full, bare).splitlines()[2:]
    assert lines[0] == (
        "| scan of 623 pairs, x published | H200 | 5,000 | **6,000** | 0.20 s | 0.15 s | 6.0 GiB |"
    )
    cells = [[cell.strip() for cell in line.split(" | ")][1:5] for line in lines]
    assert cells[1:4] == [
        ["H200", "1.3", "**1.25**", "0.16 s"],
        ["H200", "1.3", "**1.25**", ""],
        ["H200", "300", "250", "0.08 s"],
    ]
    assert lines[4].endswith("| **6,000** | 0.20 s | not measured | not measured |")
    assert cells[6] == ["H100", "1.3", "not measured", ""]
    assert lines[-1].startswith("| scan of 100,000 words, once | | | not measured")


def test_a_scan_of_many_words_stands_beside(tmp_path: Path) -> None:
    folder = write(tmp_path / "NVIDIA-H200", "tli_scan", scan_rows())
    row = {"shape": {"words": 100_000}, "ms": 90e3, "gpu_ms": None, "peak_mib": 10_240.0}
    write(folder, "tli_scan_many", [row])
    assert scan_table(folder).splitlines()[-1] == (
        "| scan of 100,000 words, once | H200 | | | 90.00 s | not measured | 10.0 GiB |"
    )


def test_a_step_that_one_gpu_lacks_is_not_measured_there(tmp_path: Path) -> None:
    def row(tokens: int, provider: str, roofline: float | None) -> dict[str, Any]:
        shape = {"tokens": tokens}
        found = {"case": "step", "provider": provider, "shape": shape, "roofline": roofline}
        return found | {"model": "llama-3-8b nf4 bf16"}

    rows = [row(64, "published", 0.01), row(64, "tli-engine", 0.5), row(4125, "tli-engine", 0.6648)]
    first = write(tmp_path / "NVIDIA-H200", "tli_step", rows)
    second = write(tmp_path / "NVIDIA-H100", "tli_step", rows[:2])
    assert step_table(first, second).splitlines()[2:] == [
        "| llama-3-8b | 64 | exact | 2.5 | **2.00** | **2.00** |",
        "| llama-3-8b | 4,125 | exact | 1.5 | 1.504 | not measured |",
    ]
