"""A comparison of tiny models, and commands that make it in this process."""

from pathlib import Path

import pytest

from tests.comparison import in_this_process, without_plots, write_comparison
from tli_engine.cli import _compare


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    without_plots(monkeypatch)
    monkeypatch.setattr(_compare, "_in_processes", in_this_process)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, pairs_file: Path) -> Path:
    return write_comparison(tmp_path_factory.mktemp("compare"), tiny_model, pairs_file)
