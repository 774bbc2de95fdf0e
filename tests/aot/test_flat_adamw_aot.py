"""Flat AdamW compiles for each architecture, with no GPU, and two of its launches fit on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("capability", [80, 89, 90, 100])
def test_compiles_as_meant(capability: int) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_flat_adamw.py")
    result = subprocess.run(
        [sys.executable, str(script), str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads(result.stdout)
    assert set(report) == {"plain", "bf16", "fp16-int32"}
    for name, kernel in report.items():
        # 65536 registers a multiprocessor: two launches that wait at their barriers both run
        assert 0 < kernel["registers"] * 512 <= 65536 // 2, f"{name}: {kernel}"
        assert kernel["spilled"] == 0, f"{name} spills {kernel['spilled']} bytes"
        # one release on arrival; the wait is a load, the first and those of the loop
        assert (kernel["releases"], kernel["acquires"]) == (1, 2), name
        # four loads for the norm; the tile that waits and the one ahead, of four buffers each
        assert (kernel["wide_loads"], kernel["wide_stores"]) == (12, 3), name
