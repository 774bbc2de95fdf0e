"""``tli-engine`` with a fault in one rank's step, or checkpoint: ``python run_with_fault.py KIND ARGS...``."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tli_engine.cli import main
from tli_engine.train import checkpoint
from tli_engine.train.sft_step import SftObserved, SftStep

KIND = sys.argv.pop(1)
FAULTY_STEP = 5
run = SftStep.run


def faulty(self: SftStep, step: int, **options: Any) -> SftObserved:
    if step == FAULTY_STEP and os.environ["RANK"] == "1":
        if KIND == "raises":
            raise ValueError("a fault of rank 1")
        # hangs
        time.sleep(600)
    return run(self, step, **options)


def killed(tensors: Any, path: Path) -> None:
    save_file(tensors, path)
    if path.parent.name == f".step-{FAULTY_STEP + 1:06d}.part":
        os.kill(os.getpid(), signal.SIGKILL)


if KIND == "killed":
    # the first one, which writes a checkpoint
    save_file, checkpoint.save_file = checkpoint.save_file, killed
else:
    SftStep.run = faulty  # type: ignore[method-assign]
sys.exit(main(sys.argv[1:]))
