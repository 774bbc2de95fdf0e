"""What ``tli-engine plan`` says that a step's peak of GPU memory will be, beside the measured one.

Each configuration is planned, then set up as training sets it up, on random weights of a model's shape,
and run for some steps. Measured is what torch had allocated at the most in them; the plan's estimate of
the CUDA context, which torch does not see, is left out of the comparison and noted beside what the
process took. Beside the peak, what is held before the first step (weights, adapters) and between steps
(the optimizer's states more). Between configurations all memory is given back.

python -m bench plan [--cases NAME ...] [--models NAME ...] [--steps N] [--budget S]
"""

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness import Row, quantiles_ms, write_results
from bench.plan_cases import CASES, TINY, PlanCase, build, plan_config, survey_of
from tli_engine.config import RunConfig
from tli_engine.models.device import choose_device
from tli_engine.train.plan import Plan, limited, make_plan
from tli_engine.train.plan_devices import find_target

_MIB = 2**20
_CONTEXT = "cuda_context"
# of a plan's components, those that change from moment to moment
_MOMENT = ("gradients", "activations", "working")
PEERS = ["bitsandbytes"]


def planned_mib(plan: Plan) -> dict[str, float]:
    """MiB by component, the CUDA context left out."""
    found = {name: size / _MIB for name, size in plan.gpu_bytes.items() if name != _CONTEXT}
    return {name: round(size, 1) for name, size in found.items()}


def run_case(case: PlanCase, steps: int) -> Row:
    """Plan a case, run it, and compare."""
    config, device = plan_config(case), choose_device("auto")
    with tempfile.TemporaryDirectory() as folder:
        target = find_target(None, config.device)
        if target.memory is not None:
            target = limited(target, case.gib)
        plan = make_plan(config, survey_of(case, Path(folder)), target)
        memory, seconds = measure(case, config, device, Path(folder), steps)
    planned = planned_mib(plan)
    notes: dict[str, Any] = {"planned_mib": planned, "recomputed": plan.recomputed} | memory
    if peak := memory.get("peak_mib"):
        notes["error"] = round(sum(planned.values()) / peak - 1, 4)
    shape = {"rows": config.train.batch_size * config.train.accumulate}
    if config.objective != "align":
        shape["length"] = config.sft.context
    return Row(
        case.name, shape, case.model, "tli-engine", *quantiles_ms(seconds), 1.0,
        peak_mib=memory.get("peak_mib"), notes=notes,
    )  # fmt: skip


def measure(
    case: PlanCase, config: RunConfig, device: torch.device, folder: Path, steps: int
) -> tuple[dict[str, float], list[float]]:
    """MiB held before the first step, between steps and at the most; seconds of the steps.

    What earlier cases left is no part of them.
    """
    let_go()
    if device.type != "cuda":
        step = build(case, config, device, folder)
        return {}, [_timed(step) for _ in range(steps)]
    total = torch.cuda.get_device_properties(device).total_memory
    share = 1.0 if case.gib is None else case.gib * 2**30 / total
    torch.cuda.set_per_process_memory_fraction(share)
    left = torch.cuda.memory_allocated()
    step = build(case, config, device, folder)
    # what loading took for a moment is no part of a step
    gc.collect()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    seconds = [_timed(step) for _ in range(steps)]
    found = {
        "left_mib": left,
        "held_mib": held - left,
        "between_steps_mib": torch.cuda.memory_allocated() - left,
        "peak_mib": torch.cuda.max_memory_allocated() - left,
        "reserved_mib": torch.cuda.max_memory_reserved(),
    }
    del step
    free, _ = torch.cuda.mem_get_info()
    found["context_mib"] = total - free - torch.cuda.memory_reserved()
    return {name: round(size / _MIB, 1) for name, size in found.items()}, seconds


def _timed(step: Any) -> float:
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def let_go() -> None:
    """Give back all memory, the libraries' workspaces too, which would count for the next case."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def print_row(row: Row) -> None:
    """One line for a person: the peak, and what is held, planned and measured."""
    notes = row.notes
    planned = notes["planned_mib"]
    head = f"{row.model:13} {row.case:18} planned {sum(planned.values()):9,.0f}"
    if row.peak_mib is None:
        print(f"{head} MiB of GPU memory; {row.ms:.0f} ms a step", flush=True)
        return
    kept = sum(size for name, size in planned.items() if name not in _MOMENT)
    moment = ", ".join(f"{name} {planned[name]:,.0f}" for name in _MOMENT if name in planned)
    print(
        f"{head} measured {row.peak_mib:9,.0f} MiB, {100 * notes['error']:+6.2f} % | between steps "
        f"{kept:8,.0f} {notes['between_steps_mib']:8,.0f} | {moment} | {row.ms:.0f} ms",
        flush=True,
    )


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Median and worst of the errors, absolute."""
    errors = {f"{row.model} {row.case}": abs(row.notes["error"]) for row in rows if row.peak_mib}
    if not errors:
        return {}
    worst = max(errors, key=lambda name: errors[name])
    return {
        "configurations": len(errors),
        "median_error": statistics.median(errors.values()),
        "worst_error": errors[worst],
        "worst": worst,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    cases = CASES if torch.cuda.is_available() else TINY
    parser.add_argument("--cases", nargs="+", choices=sorted({c.name for c in cases}))
    parser.add_argument("--models", nargs="+", choices=sorted({c.model for c in cases}))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--budget", type=float, help="seconds after which no case is begun")
    return parser.parse_args()


def main() -> None:
    args, start = arguments(), time.perf_counter()
    rows: list[Row] = []
    absent: list[dict[str, str]] = []
    for case in CASES if torch.cuda.is_available() else TINY:
        if (args.cases and case.name not in args.cases) or (
            args.models and case.model not in args.models
        ):
            continue
        try:
            if args.budget is not None and time.perf_counter() - start >= args.budget:
                raise TimeoutError("no time left")
            rows.append(run_case(case, args.steps))
        except Exception as error:
            reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"
            absent.append({"case": case.name, "model": case.model, "reason": reason})
            print(f"{case.model:13} {case.name:18} not measured: {reason}", flush=True)
            continue
        print_row(rows[-1])
        write_results("plan", rows, PEERS, absent=absent, **summary(rows))
    if not rows:
        raise SystemExit("nothing was measured")
    path = write_results("plan", rows, PEERS, absent=absent, **summary(rows))
    if found := summary(rows):
        print(
            f"{found['configurations']} configurations: off by {100 * found['median_error']:.2f} % "
            f"in the median, {100 * found['worst_error']:.2f} % at worst ({found['worst']})"
        )
    print(f"written: {path}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
