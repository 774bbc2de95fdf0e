"""The rotary embedding's kernel compiles for each architecture, with no GPU, and fits it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

EXPECTED = {
    *("fwd-64-48-128-bf16", "bwd-64-48-128-bf16", "fwd-8192-80-128-bf16"),
    *("bwd-8192-80-128-bf16", "fwd-64-15-64-fp16"),
}


@pytest.mark.parametrize("angles", [[], ["fp32"]], ids=["angles-as-x", "angles-fp32"])
@pytest.mark.parametrize("capability", [80, 89, 90, 100])
def test_compiles_without_spills(capability: int, angles: list[str]) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_rotary.py")
    result = subprocess.run(
        [sys.executable, str(script), str(capability), *angles],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads(result.stdout)
    assert set(report) >= EXPECTED
    for name, kernel in report.items():
        assert kernel["registers"] > 0, f"{name}: {kernel['log']}"
        assert kernel["spilled"] == 0, f"{name} spills {kernel['spilled']} bytes"
        # angles reach each head's thread from the cache, not by way of shared memory
        assert kernel["shared"] == 0, f"{name}: {kernel['shared']}"
        assert kernel["waits"] == (capability >= 90), f"{name}: its launch overlaps, or not"
        # rows are read and written 16 bytes at a time
        assert kernel["wide"] > 0, name
        assert kernel["narrow"] == 0, f"{name}: {kernel['narrow']} by halves"
