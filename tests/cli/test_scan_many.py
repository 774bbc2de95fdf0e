"""One command takes twenty thousand words, in memory that the words' number hardly moves."""

import subprocess
import sys
from pathlib import Path

import pytest

from tli_engine.testing import save_tiny_model

PAIRS, WIDTH, LAYERS = 10_000, 64, 4
# the highest resident memory of a process that runs a command, MB
PROGRAM = """
import resource, sys
import torch
torch.set_num_threads(1)
from tli_engine.cli import main
status = main(sys.argv[1:])
print(status, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, file=sys.stderr)
"""


@pytest.mark.long
def test_twenty_thousand_words_in_bounded_memory(tmp_path: Path) -> None:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS}
    model = save_tiny_model(tmp_path / "model", "llama", **sizes)
    rows = ["swahili,english", *(f"a{i},b{i}" for i in range(PAIRS))]
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")

    def megabytes(*options: object) -> float:
        args = ["scan", model, "--pairs", tmp_path / "pairs.csv", *options]
        command = [sys.executable, "-c", PROGRAM, *map(str, args)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        status, peak = result.stderr.split()[-2:]
        assert status == "0", result.stderr
        return float(peak)

    # all cosines at once would take 800 MB, and what is computed from them several times that;
    # a tile of them takes 67 MB
    assert megabytes() - megabytes("--limit", 100) < 600
