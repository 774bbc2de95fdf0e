"""The gated activation's kernels compile for each architecture, with no GPU, and fit it."""

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton")

EXPECTED = {
    *("fwd-64-14336-silu-bf16", "bwd-64-14336-silu-bf16", "bwd-8192-29568-silu-bf16"),
    *("fwd-8192-6912-gelu_tanh-bf16", "bwd-8192-6912-gelu_tanh-bf16"),
}


def test_compiles_without_spills(
    capability: int, compile_kernels: Callable[[str], dict[str, Any]]
) -> None:
    report = compile_kernels("swiglu")
    assert set(report) >= EXPECTED
    for name, kernel in report.items():
        assert kernel["spilled"] == 0, f"{name} spills {kernel['spilled']} bytes"
        assert kernel["shared"] == 0, f"{name}: {kernel['shared']}"
        assert kernel["waits"] == (capability >= 90), f"{name}: its launch overlaps, or not"
        # rows are read and written 16 bytes at a time
        assert kernel["wide"] > 0, name
        assert kernel["narrow"] == 0, f"{name}: {kernel['narrow']} by halves"
