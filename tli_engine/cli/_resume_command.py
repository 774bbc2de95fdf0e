"""The command that goes on with a stopped run, as its processes were started."""

import os
import shlex
from pathlib import Path

from tli_engine.distributed.launch import PROMISED


def how_to_resume(folder: Path, processes: int) -> str:
    """A line that says how to go on with a run in as many processes, started as this one was.

    Args:
        folder: Of the run.
        processes: That it has.
    """
    if PROMISED in os.environ:
        return f"resume with: {by_gpus(folder, processes)}"
    if processes == 1:
        return f"resume with: tli-engine train --resume --run {_quoted(folder)}"
    command = f"train --resume --run-folder {_quoted(folder)}"
    machines, here = _by_torchrun()
    if machines * here != processes:
        return f"resume in {processes} processes, started as these were, with: tli-engine {command}"
    module = f"--nproc-per-node {here} -m tli_engine {command}"
    if machines == 1:
        return f"resume with: torchrun {module}"
    # where they meet is said to torchrun alone
    return (
        f"resume on each of the {machines} machines, with the flags that say where they meet, with: "
        f"torchrun --nnodes {machines} {module}"
    )


def by_gpus(folder: Path, gpus: int) -> str:
    """The command that goes on with a run on so many GPUs of this machine."""
    return f"tli-engine train --resume --run {_quoted(folder)} --gpus {gpus}"


def _by_torchrun() -> tuple[int, int]:
    """Machines of a run, and processes of this one; zeros if another started them."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 0
    machines, here = (
        os.environ.get(name) or 0 for name in ("GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE")
    )
    return int(machines), int(here)


def _quoted(folder: Path) -> str:
    return shlex.quote(str(folder))
