"""The norm's kernels compile for each architecture, with no GPU, and fit it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# shared memory of a program, in KiB: the architecture's most
ARCHITECTURES = {80: 163, 89: 99, 90: 227, 100: 227}
EXPECTED = {
    *("fwd-64-4096-bf16", "fwd-alone-8192-8192-bf16", "bwd-64-576-bf16", "sum-rows"),
    *("bwd-8192-8192-bf16", "bwd-dweight-8192-4096-bf16", "bwd-dweight-64-16384-fp32"),
}


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_compiles_without_spills(capability: int) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_add_rms_norm.py")
    result = subprocess.run(
        [sys.executable, str(script), str(capability)],
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
        # the widest rows and a part of the weight's gradient as long only have to fit
        spilled = 256 if name.startswith("bwd-dweight") and "-16384-" in name else 0
        assert kernel["spilled"] <= spilled, f"{name} spills {kernel['spilled']} bytes"
        assert kernel["shared"] <= ARCHITECTURES[capability] * 1024, f"{name}: {kernel['shared']}"
        assert kernel["waits"] == (capability >= 90), f"{name}: its launch overlaps, or not"
        # rows are read and written 16 bytes at a time
        assert kernel["wide"] > 0, name
        assert kernel["narrow"] == 0 or name == "sum-rows", f"{name}: {kernel['narrow']} by halves"
