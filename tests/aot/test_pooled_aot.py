"""The pooling, cosine and loss kernels compile for each architecture, with no GPU, and fit it."""

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton")

EXPECTED = {
    *("mean-bf16", "mean-backward-bf16", "mean-fp64", "unit-fp32", "cosine-32-32"),
    *("few-64-infonce-bf16", "few-backward-64-infonce-bf16", "few-64-semihard-bf16", "pairs"),
    *("rows-infonce", "columns-semihard", "gradient-hardest", "end-infonce", "word-rows"),
}


def test_compiles_without_spills(
    capability: int, compile_kernels: Callable[[str], dict[str, Any]]
) -> None:
    report = compile_kernels("pooled")
    assert set(report) >= EXPECTED
    for name, kernel in report.items():
        assert kernel["spilled"] == 0, f"{name} spills {kernel['spilled']} bytes"
