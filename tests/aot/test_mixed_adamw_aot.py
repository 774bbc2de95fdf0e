"""AdamW of 16-bit tensors compiles for each architecture, with no GPU, and moves 16 bytes a thread."""

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton")


def test_compiles_as_meant(
    capability: int, compile_kernels: Callable[[str], dict[str, Any]]
) -> None:
    report = compile_kernels("mixed_adamw")
    assert len(report) == 6
    for name, kernel in report.items():
        # enough warps on a multiprocessor to keep its memory busy
        assert 0 < kernel["registers"] <= 96, f"{name}: {kernel}"
        assert kernel["spilled"] == 0, f"{name} spills {kernel['spilled']} bytes"
        # one of 16 bits and three of fp32 each way; or all of 16 bits, the gradient read alone
        wide = (7, 7) if name.startswith("master") else (4, 3)
        assert (kernel["wide_loads"], kernel["wide_stores"]) == wide, name
