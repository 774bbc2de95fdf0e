"""The work of ``tli-engine plan`` and of ``train --dry-run``."""

import json

from tli_engine.cli.console import plain_table, show
from tli_engine.config import RunConfig
from tli_engine.models.survey import survey
from tli_engine.train.plan import Plan, limited
from tli_engine.train.plan_devices import find_target
from tli_engine.train.plan_gpus import plan_for

_MIB = 2**20


def run_plan(
    config: RunConfig,
    device: str | None = None,
    memory: float | None = None,
    as_json: bool = False,
    gpus: int = 1,
) -> None:
    """Print the plan of a run, on one or several GPUs."""
    target = limited(find_target(device, config.device), memory)
    plan = plan_for(config, survey(config.model), target, gpus)
    if as_json:
        print(json.dumps(plan.to_json(), indent=1))
    else:
        _print(plan)


def _print(plan: Plan) -> None:
    first, *notes = plan.notes
    gpu = "GPU" if plan.gpus == 1 else "each GPU"
    print(first)
    table = plain_table()
    for column in ("where", "what"):
        table.add_column(column)
    table.add_column("MiB", justify="right")
    table.add_row("download", "", _mib(plan.download_bytes))
    table.add_row("disk", "", _mib(plan.disk_bytes))
    for where, parts in (("host", plan.host_bytes), (gpu, plan.gpu_bytes)):
        for name, size in parts.items():
            table.add_row(where, name.replace("_", " "), _mib(size))
        if parts:
            table.add_row(where, "in all", _mib(sum(parts.values())))
    show(table)
    if plan.step_seconds is not None:
        print(f"a step like this took {plan.step_seconds * 1000:.4g} ms")
    for note in notes:
        print(note)


def _mib(size: int) -> str:
    return f"{size / _MIB:,.1f}"
