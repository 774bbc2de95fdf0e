"""The rows' cross-entropy compiles for each architecture, with no GPU, and fits it as meant."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

WIDE = {"128256-bf16", "152064-bf16", "262144-bf16", "128256-fp32", "49152-fp16"}


@pytest.mark.parametrize("capability", [80, 89, 90, 100])
def test_compiles_without_spills(capability: int) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_cross_entropy_rows.py")
    result = subprocess.run(
        [sys.executable, str(script), str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads(result.stdout)
    assert set(report) == WIDE | {"272-bf16"}
    for name, kernel in report.items():
        assert kernel["registers"] > 0, f"{name}: {kernel['log']}"
        assert kernel["spilled"] == 0, f"{name} spills {kernel['spilled']} bytes"
        # one number of each of 32 warps: nothing else passes between threads
        assert kernel["shared"] <= 128, f"{name}: {kernel['shared']}"
        assert kernel["waits"] == (capability >= 90), f"{name}: its launch overlaps, or not"
        # the target's logit alone is not read or written 16 bytes at a time
        assert kernel["narrow"] == ("fp32" not in name), f"{name}: {kernel['narrow']} by halves"
        if name in WIDE:
            # four loads in each pass, and four stores
            assert kernel["wide"] == 12, f"{name}: {kernel['wide']}"
            # 65536 registers a multiprocessor: a second program of 1024 threads finds no room
            assert kernel["registers"] > 32, name
