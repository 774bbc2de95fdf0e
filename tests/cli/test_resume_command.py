"""The line that says how to go on with a run names the way in which its processes were started."""

from pathlib import Path

import pytest

from tli_engine.cli._resume_command import how_to_resume

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none"}


@pytest.mark.parametrize(
    ("said", "processes", "line"),
    [
        ({}, 1, "resume with: tli-engine train --resume --run 'my run'"),
        (
            {"TLI_ENGINE_PROCESSES": "2", **TORCHRUN},
            2,
            "resume with: tli-engine train --resume --run 'my run' --gpus 2",
        ),
        (
            {"GROUP_WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "4", **TORCHRUN},
            4,
            "resume with: torchrun --nproc-per-node 4 -m tli_engine train --resume --run-folder 'my run'",
        ),
        (
            {"GROUP_WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "8", **TORCHRUN},
            16,
            "resume on each of the 2 machines, with the flags that say where they meet, with: "
            "torchrun --nnodes 2 --nproc-per-node 8 -m tli_engine train --resume --run-folder 'my run'",
        ),
        # eight on one machine and four on the other
        (
            {"GROUP_WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "8", **TORCHRUN},
            12,
            "resume in 12 processes, started as these were, with: "
            "tli-engine train --resume --run-folder 'my run'",
        ),
        # as a cluster's own launcher starts them
        (
            {},
            2,
            "resume in 2 processes, started as these were, with: "
            "tli-engine train --resume --run-folder 'my run'",
        ),
    ],
    ids=["one", "gpus", "torchrun", "machines", "machines of unlike size", "another launcher"],
)
def test_names_the_way_of_starting(
    said: dict[str, str], processes: int, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TLI_ENGINE_PROCESSES", "TORCHELASTIC_RUN_ID", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert how_to_resume(Path("my run"), processes) == line
