"""The rows' cross-entropy compiles for each architecture, with no GPU, and fits it as meant."""

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton")

WIDE = {"128256-bf16", "152064-bf16", "262144-bf16", "128256-fp32", "49152-fp16"}


def test_compiles_without_spills(
    capability: int, compile_kernels: Callable[..., dict[str, Any]]
) -> None:
    report = compile_kernels("cross_entropy_rows")
    assert set(report) == WIDE | {"272-bf16"}
    for name, kernel in report.items():
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
