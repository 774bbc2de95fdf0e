"""The attention kernels compile for each architecture, with no GPU, and fit it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# shared memory of a program, in KiB: the architecture's most
ARCHITECTURES = {80: 163, 89: 99, 90: 227, 100: 227}
MODELS = ("128-4-bf16", "128-8-bf16", "64-3-bf16")


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_compiles_without_spills(capability: int) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_word_attention.py")
    result = subprocess.run(
        [sys.executable, str(script), str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads(result.stdout)
    assert {f"{direction}-{model}" for direction in ("fwd", "bwd") for model in MODELS} <= set(
        report
    )
    for name, kernel in report.items():
        # elsewhere ptxas may give up a few registers to fit one program more on a processor; fp32
        # heads of 256 only have to fit
        spilled = 512 if name.endswith("256-1-fp32") else 32
        # on Hopper the backward's wide tiles are faster for all that: see backward_tile
        if capability == 90 and name.startswith("fwd") and name.partition("-")[2] in MODELS:
            spilled = 0
        if capability == 90 and name.startswith("bwd-256"):
            spilled = max(spilled, 64)
        assert kernel["registers"] > 0, f"{name}: {kernel['log']}"
        assert kernel["spilled"] <= spilled, f"{name} spills {kernel['spilled']} bytes"
        assert kernel["in_flight"] == 0, f"{name}: operands are overwritten under a product"
        assert not kernel["serialised"], f"{name}: ptxas waits for every wgmma"
        assert kernel["shared"] <= ARCHITECTURES[capability] * 1024, f"{name}: {kernel['shared']}"
