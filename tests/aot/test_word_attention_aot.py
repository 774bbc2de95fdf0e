"""The attention kernels compile for each architecture, with no GPU, and fit it."""

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton")

MODELS = ("128-4-bf16", "128-8-bf16", "64-3-bf16")


def test_compiles_without_spills(
    capability: int, compile_kernels: Callable[[str], dict[str, Any]]
) -> None:
    report = compile_kernels("word_attention")
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
        assert kernel["spilled"] <= spilled, f"{name} spills {kernel['spilled']} bytes"
        assert kernel["in_flight"] == 0, f"{name}: operands are overwritten under a product"
        assert not kernel["serialised"], f"{name}: ptxas waits for every wgmma"
