"""What a training step of the published kind asks of the device, and who asks: counted on a CPU, without a GPU.

Runs ``bench/scripts/train_early.py`` on a tiny Llama of 32 blocks in NF4, as it is, under ``tli-engine run``
with every kernel launched by itself, and with blocks replayed from graphs, for which a stand-in of one
operation runs. Counted are the operations of one step that would launch at least one kernel on a GPU, by
the library whose line asks for them; backward ones by the line whose gradient they are.

python -m bench drop_in_launches [--layers N]
"""

import argparse
import random
import re
import runpy
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from bench.bench_drop_in import FEW, SCRIPTS, cases, tiny_subject, write_model
from tli_engine.integrations import model_parts, training_graphs
from tli_engine.integrations.script import run_script

# views, allocations, and reads of a tensor on the host launch nothing
_FREE = re.compile(
    r"aten\.(alias|as_strided|detach|diagonal|empty|empty_like|empty_strided|expand|lift_fresh|new_empty"
    r"|new_empty_strided|permute|select|slice|split|split_with_sizes|squeeze|t|transpose|unbind|unsqueeze"
    r"|_unsafe_view|view|_reshape_alias|_local_scalar_dense)\b|prim\."
)
_OWNERS = {
    "/bench/scripts/": "script",
    "/tli_engine/": "tli-engine",
    "/peft/": "PEFT",
    "/bitsandbytes/": "bitsandbytes",
    "/transformers/": "transformers",
    "/torch/optim/": "optimizer",
}
# the step that is counted: shapes have come often enough by then
_STEP = 40
_PAIRS = 8 * (_STEP + 2)


class Counting(TorchDispatchMode):
    """Counts operations by owner and direction."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _FREE.match(str(func)):
            node = torch._C._current_autograd_node()
            lines = _frames() if node is None else reversed(node.metadata.get("traceback_", []))
            owner = next((name for line in lines if (name := _owner(line))), "other")
            self.found[owner, "forward" if node is None else "backward"] += 1
        return func(*args, **(kwargs or {}))


def _frames() -> Iterator[str]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame.f_code.co_filename
        frame = frame.f_back


def _owner(line: str) -> str | None:
    # a traceback's entry begins with the file, of which the last folder counts
    path = line.partition('", line')[0]
    found = {path.rfind(part): name for part, name in _OWNERS.items() if part in path}
    return found[max(found)] if found else None


class _AsOnGpu(torch.optim.AdamW):
    """With several tensors an operation, which is the default on a GPU."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, foreach=True, **options)


class _StandIn:
    """In place of what records: a replay is one operation, and gives no right numbers."""

    def launch(self, run: Callable[[], Any]) -> Any:
        return run()

    def new_pool(self) -> None:
        """None is needed."""

    def memory(self, pool: None) -> int:
        return 0

    def record(self, run: Callable[[], Any], pool: None) -> tuple[Any, Any]:
        one = torch.zeros(1)
        return mock.Mock(replay=lambda: one.add_(1)), run()


@contextmanager
def _counted_step(counting: Counting) -> Iterator[None]:
    """Count from the end of one step to that of the next."""
    step, steps = LRScheduler.step, Counter[str]()

    def counted(scheduler: Any, *args: Any) -> None:
        if steps["all"] == _STEP:
            counting.__exit__(None, None, None)
        step(scheduler, *args)
        steps["all"] += 1
        torch.autograd.set_detect_anomaly(steps["all"] == _STEP, check_nan=False)
        if steps["all"] == _STEP:
            counting.__enter__()

    with mock.patch.object(LRScheduler, "step", counted):
        yield


def count(folder: Path, way: str) -> Counter[tuple[str, str]]:
    """Operations of one step, one ``way``: ``plain``, ``launched`` or ``replayed``."""
    counting = Counting()
    case = cases(folder, FEW | {"train": _PAIRS})["train"]
    script = SCRIPTS / case.script
    arguments = [*case.before, str(folder / "out.csv"), *case.after]
    random.seed(0)
    with ExitStack() as patches:
        patches.enter_context(_counted_step(counting))
        patches.enter_context(mock.patch.object(torch.optim, "AdamW", _AsOnGpu))
        if way == "plain":
            patches.enter_context(mock.patch.object(sys, "argv", [str(script), *arguments]))
            runpy.run_path(str(script), run_name="__main__")
            return counting.found
        # the counting itself is one of those who watch
        patches.enter_context(mock.patch.object(model_parts, "has_modes", bool))
        if way == "replayed":
            graphs = training_graphs.TrainingGraphs
            made = mock.Mock(side_effect=lambda: graphs(lambda device: _StandIn()))
            patches.enter_context(mock.patch("tli_engine.integrations.script.TrainingGraphs", made))
            patches.enter_context(mock.patch.object(training_graphs, "_observed", _nobody))
        status, _, _ = run_script(script, arguments, lambda line: None)
        if status:
            raise SystemExit(status)
    return counting.found


def _nobody(device: torch.device) -> None:
    """In place of who watches launches."""


def print_counts(found: dict[str, Counter[tuple[str, str]]]) -> None:
    """A table: a row an owner, a column a way, forward and backward."""
    owners = dict.fromkeys(owner for counts in found.values() for owner, _ in counts)
    print(f"{'forward + backward':20}" + "".join(f"{way:>16}" for way in found))
    for owner in owners:
        cells = [f"{c[owner, 'forward']:,} + {c[owner, 'backward']:,}" for c in found.values()]
        print(f"{owner:20}" + "".join(f"{cell:>16}" for cell in cells))
    print(f"{'all':20}" + "".join(f"{c.total():>16,}" for c in found.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=32, help="blocks of the model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(tiny_subject(args.layers, torch.bfloat16, nf4=True), folder / "model")
        print_counts({way: count(folder, way) for way in ("plain", "launched", "replayed")})


if __name__ == "__main__":
    main()
