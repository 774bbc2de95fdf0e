"""The rotary embedding's kernel compiles for each architecture, with no GPU, and fits it."""

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton")

EXPECTED = {
    *("fwd-64-48-128-bf16", "bwd-64-48-128-bf16", "fwd-8192-80-128-bf16"),
    *("bwd-8192-80-128-bf16", "fwd-64-15-64-fp16"),
}


@pytest.mark.parametrize("angles", [[], ["fp32"]], ids=["angles-as-x", "angles-fp32"])
def test_compiles_without_spills(
    capability: int, angles: list[str], compile_kernels: Callable[..., dict[str, Any]]
) -> None:
    report = compile_kernels("rotary", *angles)
    assert set(report) >= EXPECTED
    for name, kernel in report.items():
        assert kernel["spilled"] == 0, f"{name} spills {kernel['spilled']} bytes"
        # angles reach each head's thread from the cache, not by way of shared memory
        assert kernel["shared"] == 0, f"{name}: {kernel['shared']}"
        assert kernel["waits"] == (capability >= 90), f"{name}: its launch overlaps, or not"
        # rows are read and written 16 bytes at a time
        assert kernel["wide"] > 0, name
        assert kernel["narrow"] == 0, f"{name}: {kernel['narrow']} by halves"
