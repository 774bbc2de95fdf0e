"""The pooling, cosine and loss kernels compile for each architecture, with no GPU, and fit it."""

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
    *("mean-bf16", "mean-backward-bf16", "mean-fp64", "unit-fp32", "cosine-32-32"),
    *("few-64-infonce-bf16", "few-backward-64-infonce-bf16", "few-64-semihard-fp32", "pairs"),
    *("rows-infonce", "columns-semihard", "gradient-hardest", "end-infonce", "word-rows"),
}


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_compiles_without_spills(capability: int) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_pooled.py")
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
        assert kernel["spilled"] == 0, f"{name} spills {kernel['spilled']} bytes"
        assert kernel["shared"] <= ARCHITECTURES[capability] * 1024, f"{name}: {kernel['shared']}"
