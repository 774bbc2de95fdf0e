"""``tli-engine`` with a fault in one rank's step: ``python run_with_fault.py KIND ARGS...``."""

import os
import sys
import time
from typing import Any

from tli_engine.cli import main
from tli_engine.train.sft_step import SftObserved, SftStep

KIND = sys.argv.pop(1)
FAULTY_STEP = 5
run = SftStep.run


def faulty(self: SftStep, step: int, **options: Any) -> SftObserved:
    if step == FAULTY_STEP and os.environ["RANK"] == "1":
        if KIND == "raises":
            raise ValueError("a fault of rank 1")
        if KIND == "killed":
            os._exit(77)
        # hangs
        time.sleep(600)
    return run(self, step, **options)


SftStep.run = faulty  # type: ignore[method-assign]
sys.exit(main(sys.argv[1:]))
