"""The norm's kernels compile for each architecture, with no GPU, and fit it."""

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton")

EXPECTED = {
    *("fwd-64-4096-bf16", "fwd-alone-8192-8192-bf16", "bwd-64-576-bf16", "sum-rows"),
    *("bwd-8192-8192-bf16", "bwd-dweight-8192-4096-bf16", "bwd-dweight-64-16384-fp32"),
}


def test_compiles_without_spills(
    capability: int, compile_kernels: Callable[[str], dict[str, Any]]
) -> None:
    report = compile_kernels("add_rms_norm")
    assert set(report) >= EXPECTED
    for name, kernel in report.items():
        # the widest rows and a part of the weight's gradient as long only have to fit
        spilled = 256 if name.startswith("bwd-dweight") and "-16384-" in name else 0
        assert kernel["spilled"] <= spilled, f"{name} spills {kernel['spilled']} bytes"
        assert kernel["waits"] == (capability >= 90), f"{name}: its launch overlaps, or not"
        # rows are read and written 16 bytes at a time
        assert kernel["wide"] > 0, name
        assert kernel["narrow"] == 0 or name == "sum-rows", f"{name}: {kernel['narrow']} by halves"
