"""Flat AdamW compiles for each architecture, with no GPU, and two of its launches fit on one."""

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton")


def test_compiles_as_meant(
    capability: int, compile_kernels: Callable[[str], dict[str, Any]]
) -> None:
    report = compile_kernels("flat_adamw")
    assert set(report) == {"plain", "bf16", "fp16-int32"}
    for name, kernel in report.items():
        # 65536 registers a multiprocessor: two launches that wait at their barriers both run
        assert 0 < kernel["registers"] * 512 <= 65536 // 2, f"{name}: {kernel}"
        assert kernel["spilled"] == 0, f"{name} spills {kernel['spilled']} bytes"
        # one release on arrival; the wait is a load, the first and those of the loop
        assert (kernel["releases"], kernel["acquires"]) == (1, 2), name
        # four loads for the norm; the tile that waits and the one ahead, of four buffers each
        assert (kernel["wide_loads"], kernel["wide_stores"]) == (12, 3), name
