"""The README's figures are those of the committed results, and its links lead somewhere."""

import re
from pathlib import Path

import pytest

from bench.readme import FILLED, README, fill


@pytest.mark.parametrize("document", FILLED, ids=lambda path: path.name)
def test_tables_and_output_are_the_committed_ones(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert fill(text) == text


def test_links_resolve() -> None:
    for document in (README, *(README.parent / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (Path(document).parent / target).exists(), f"{document}: {target}"
