"""Decoding's attention compiles for each architecture, with no GPU, and fits it."""

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton")

EXPECTED = {
    *("attend-16-32-8-128-bf16", "add-16-32-8-128-bf16", "attend-1-32-8-128-bf16"),
    *("attend-256-32-8-128-bf16", "attend-16-4-1-256-bf16", "attend-16-9-3-64-fp16"),
}


def test_compiles_without_spills(
    capability: int, compile_kernels: Callable[..., dict[str, Any]]
) -> None:
    report = compile_kernels("cached_attention")
    assert set(report) >= EXPECTED
    assert "add-256-32-8-128-bf16" not in report
    for name, kernel in report.items():
        assert kernel["spilled"] == 0, f"{name} spills {kernel['spilled']} bytes"
        assert kernel["waits"] == (capability >= 90), f"{name}: its launch overlaps, or not"
        assert kernel["in_flight"] == 0, name
