import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from tli_engine import extension

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the extension is looked for, with nothing there; what was found before is forgotten."""
    monkeypatch.setattr(extension, "_load", cache(extension._load.__wrapped__))
    monkeypatch.setattr(extension, "_LIBRARY", tmp_path / "_C.so")
    return tmp_path / "_C.so"


def run_setup(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "TLI_ENGINE_CUDA")}
    return subprocess.run(
        [sys.executable, "setup.py", *(arguments or ("--name",))],
        cwd=ROOT,
        env=clean | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_missing_extension_says_how_to_get_it(library: Path) -> None:
    assert not extension.load()
    assert extension.status().startswith("the extension is not built: make cuda, or")


def test_broken_extension_says_why_in_a_line(library: Path) -> None:
    library.write_bytes(b"not a library")
    assert not extension.load()
    assert extension.status().startswith("the extension cannot be loaded, build it anew: ")
    assert "\n" not in extension.status()


def test_it_is_looked_for_once(library: Path) -> None:
    assert not extension.load()
    library.write_bytes(b"not a library")
    assert extension.status().startswith("the extension is not built")


def test_status_agrees_with_load() -> None:
    assert extension.status().startswith("loaded from") == extension.load()


def test_importing_does_not_load() -> None:
    program = (
        "import torch; loaded = []; torch.ops.load_library = loaded.append;"
        "import tli_engine.extension; print(loaded)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_fake_has_the_products_shape_and_dtype() -> None:
    x = torch.empty(3, 64, dtype=torch.bfloat16, device="meta")
    none = torch.empty(0)
    y = extension._fake(x, none, None, None, None, [], 128, 64, False, True, [], none, none)
    assert y.shape == (3, 128)
    assert y.dtype == x.dtype
    assert y.device == x.device
    assert y.is_contiguous()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        pytest.param(
            {"TLI_ENGINE_CUDA": "1", "CUDA_HOME": "/nowhere"},
            "needs nvcc: set CUDA_HOME",
            id="nvcc",
        ),
        pytest.param({"TLI_ENGINE_CUDA": "yes"}, "must be 0 or 1, got 'yes'", id="word"),
    ],
)
def test_build_that_cannot_be_is_refused_in_a_line(
    environment: dict[str, str], message: str
) -> None:
    pytest.importorskip("setuptools")
    result = run_setup(environment)
    assert result.returncode != 0
    assert message in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "environment", [{"TLI_ENGINE_CUDA": "0"}, {"CUDA_HOME": "/nowhere"}], ids=str
)
def test_build_without_cuda_is_pure(environment: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    folders = ("--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"))
    result = run_setup(environment, "build_ext", *folders)
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.rglob("*.so")) == []
