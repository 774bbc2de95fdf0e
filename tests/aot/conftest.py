"""Kernels compiled by a script beside the test, for architectures that need not be here."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

# shared memory of a program, in KiB: the architecture's most
_SHARED = {80: 163, 89: 99, 90: 227, 100: 227}


@pytest.fixture(params=_SHARED)
def capability(request: pytest.FixtureRequest) -> int:
    """Ampere, Ada, Hopper, Blackwell."""
    capability: int = request.param
    return capability


@cache
def _reports_of(name: str, *options: str) -> dict[str, dict[str, Any]]:
    """What ``compile_<name>.py`` says of every architecture; run once, without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name(f"compile_{name}.py")
    result = subprocess.run(
        [sys.executable, str(script), ",".join(map(str, _SHARED)), *options],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    reports: dict[str, dict[str, Any]] = json.loads(result.stdout)
    return reports


@pytest.fixture
def compile_kernels(capability: int) -> Callable[..., dict[str, Any]]:
    """Compile ``compile_<name>.py``'s kernels; all assemble and fit."""

    def report_of(name: str, *options: str) -> dict[str, Any]:
        report = _reports_of(name, *options)[str(capability)]
        for kernel, found in report.items():
            assert found["registers"] > 0, f"{kernel}: {found['log']}"
            assert found["shared"] <= _SHARED[capability] * 1024, f"{kernel}: {found['shared']}"
        return report

    return report_of
