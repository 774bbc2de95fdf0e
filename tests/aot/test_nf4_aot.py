"""The NF4 kernels compile for each architecture, with no GPU, and fit it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# shared memory of a program, in KiB: the architecture's most
ARCHITECTURES = {80: 163, 89: 99, 90: 227, 100: 227}


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_compiles_without_spills(capability: int) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_nf4.py")
    result = subprocess.run(
        [sys.executable, str(script), str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads(result.stdout)
    for name, kernel in report.items():
        assert kernel["registers"] > 0, f"{name}: {kernel['log']}"
        assert kernel["spilled"] == 0, f"{name} spills {kernel['spilled']} bytes"
        assert kernel["in_flight"] == 0, f"{name}: weights are overwritten under a product"
        assert not kernel["serialised"], f"{name}: ptxas waits for every wgmma"
        assert kernel["shared"] <= ARCHITECTURES[capability] * 1024, f"{name}: {kernel['shared']}"
    if capability == 90:
        # decoded weights go from registers to the tensor cores, not through shared memory
        assert all(k["wgmma_from_registers"] for n, k in report.items() if "fwd" in n)
