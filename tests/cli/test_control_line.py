"""What is said of the change on control pairs: nothing of a handful."""

import pytest
import torch

from tli_engine.align.retrieval import measure_alignment
from tli_engine.cli.console import control_line
from tli_engine.evaluate.alignment import Row


def row_of(pairs: int) -> Row:
    """Before, no translation is the nearest; after, each of them is."""
    words = torch.eye(pairs, dtype=torch.float64)
    groups = list(range(pairs))
    before, after = (measure_alignment(words, t, groups, groups) for t in (words.roll(1, 0), words))
    return Row(2, "content", "bare", "cosine", "control", 1.0, before, after)


@pytest.mark.parametrize(
    ("pairs", "verdict"),
    [
        (6, "6 pairs cannot tell a change from noise, 20 might"),
        (19, "19 pairs cannot tell a change from noise, 20 might"),
        (20, "a change"),
    ],
)
def test_few_pairs_tell_no_change_however_large(pairs: int, verdict: str) -> None:
    line = control_line(row_of(pairs))
    assert "→ 1.000, 95 % interval of the change [+0." in line
    assert f"]: {verdict}; chance 0." in line
