"""The NF4 kernels compile for each architecture, with no GPU, and fit it."""

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton")


def test_compiles_without_spills(
    capability: int, compile_kernels: Callable[[str], dict[str, Any]]
) -> None:
    report = compile_kernels("nf4")
    for name, kernel in report.items():
        assert kernel["spilled"] == 0, f"{name} spills {kernel['spilled']} bytes"
        assert kernel["in_flight"] == 0, f"{name}: weights are overwritten under a product"
        assert not kernel["serialised"], f"{name}: ptxas waits for every wgmma"
    if capability == 90:
        # decoded weights go from registers to the tensor cores, not through shared memory
        assert all(k["wgmma_from_registers"] for n, k in report.items() if "fwd" in n)
