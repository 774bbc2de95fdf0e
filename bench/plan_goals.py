"""What the planner says of measured runs: the goal of plans, beside the committed peaks."""

import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from bench.bench_scaling import CASES as SHARED_OUT
from bench.bench_scaling import HOW, PROVIDERS
from bench.goals import rows_of
from bench.plan_cases import CASES as PLANNED
from bench.plan_cases import PlanCase, plan_config, survey_of
from bench.train_cases import CASES, Case, Provider, optimizer_of, providers_of, train_config
from tli_engine.models.survey import Survey
from tli_engine.train.plan import Plan, limited, make_plan
from tli_engine.train.plan_devices import NAMES, Target, find_target
from tli_engine.train.plan_gpus import plan_for

Row = dict[str, Any]
_TRAINED = {"lora_early": "blocks 0-2", "lora_all": "all blocks", "full": "all weights"}
_GRAPHS = {provider: graphs for graphs, provider in PROVIDERS.items()}
# of the peak, in the median and at worst
_MEDIAN, _WORST = 0.05, 0.15


def planned_peaks(folder: Path) -> Iterator[tuple[Row, Plan]]:
    """The engine's measured steps of fine-tuning, and what the planner says of each today."""
    device = device_of(folder)
    for row in rows_of(folder, "train_step"):
        case = CASES[row["case"]]
        of_case = {p.name: p for p in providers_of(case, row["model"]) if p.kind == "engine"}
        provider = of_case.get(row["provider"])
        # no run computes in fp32 with these weights
        if provider is None or provider.fp32:
            continue
        values = _run_of(row, case, provider)
        run = plan_config(PlanCase(row["case"], row["model"], values))
        model = Survey(row["model"], train_config(row["model"]), None)
        yield row, make_plan(run, model, limited(device, provider.memory_gib or None))


def planned_cases(folder: Path) -> Iterator[tuple[Row, Plan]]:
    """The measured configurations of ``bench plan``, and what the planner says of each today."""
    device, by_name = device_of(folder), {(c.model, c.name): c for c in PLANNED}
    for row in rows_of(folder, "plan"):
        case = by_name[row["model"], row["case"]]
        with tempfile.TemporaryDirectory() as model:
            survey = survey_of(case, Path(model))
            yield row, make_plan(plan_config(case), survey, limited(device, case.gib))


def planned_shares(folder: Path) -> Iterator[tuple[Row, Plan]]:
    """The measured steps of several GPUs, and what the planner says today of each GPU."""
    device = device_of(folder)
    for row in rows_of(folder, "scaling"):
        shape, case = row["shape"], SHARED_OUT[row["case"]]
        if shape["gpus"] == 1:
            continue
        values = _of_texts(
            case.method,
            nf4=case.method == "lora",
            layers="all",
            sft={"context": shape["length"]},
            train={
                "batch_size": shape["rows"],
                "accumulate": shape["gpus"],
                "cuda_graph": _GRAPHS[row["provider"]],
            },
        )
        values["distributed"] = {"weights": case.weights}
        run = plan_config(PlanCase(row["case"], row["model"], values))
        model = Survey(row["model"], train_config(row["model"]), None)
        yield row, plan_for(run, model, device, shape["gpus"])


@cache
def _once(
    planned: Callable[[Path], Iterator[tuple[Row, Plan]]], folder: Path
) -> list[tuple[Row, Plan]]:
    """Plans of which several tables are made: they take seconds."""
    return list(planned(folder))


def device_of(folder: Path) -> Target:
    """The GPU that a folder of results is of, as the planner knows it."""
    names = (n for n in NAMES if find_target(n, "auto").results == folder.name)
    return find_target(next(names), "auto")


def allocated_mib(plan: Plan) -> float:
    """What a plan says that torch will have allocated, MiB."""
    return (sum(plan.gpu_bytes.values()) - plan.gpu_bytes["cuda_context"]) / 2**20


def peaks_table(folder: Path) -> str:
    """Peaks of steps of fine-tuning: the planner's beside the measured ones."""
    found = (
        (f"{_TRAINED[r['case']]} | {r['provider']}", r, p) for r, p in _once(planned_peaks, folder)
    )
    return _table("model | trained | who", found)


def cases_table(folder: Path) -> str:
    """Peaks of all kinds of runs: the planner's beside the measured ones."""
    return _table("model | run", ((r["case"], r, p) for r, p in _once(planned_cases, folder)))


def shares_table(folder: Path) -> str:
    """Peaks of each of several GPUs: the planner's beside the measured ones."""
    found = ((_shared_out(row), row, plan) for row, plan in _once(planned_shares, folder))
    return _table("model | trained | GPUs", found)


def _shared_out(row: Row) -> str:
    case, shape = SHARED_OUT[row["case"]], row["shape"]
    trained = _TRAINED["full" if case.method == "full" else "lora_all"]
    shares = ", NF4 in shares" if case.weights == "sharded" else ""
    rows = f"{shape['rows']} x {shape['length']:,} tokens"
    return f"{trained}{shares}, {rows}{HOW[row['provider']]} | {shape['gpus']}"


def errors_table(folder: Path) -> str:
    """How far off the planner is today, of all measured peaks."""
    all_of_them = (planned_cases, planned_peaks, planned_shares)
    found = [row for planned in all_of_them for row in _once(planned, folder)]
    errors = [abs(allocated_mib(plan) / row["peak_mib"] - 1) for row, plan in found]
    median, worst = statistics.median(errors), max(errors)
    cells = [
        f"**{100 * error:.1f} %**" if error <= goal else f"{100 * error:.1f} %"
        for error, goal in ((median, _MEDIAN), (worst, _WORST))
    ]
    return (
        "| runs | off in the median, goal 5 % | at worst, goal 15 % |\n|---:|---:|---:|\n"
        f"| {len(found)} | {' | '.join(cells)} |"
    )


def _table(head: str, found: Iterable[tuple[str, Row, Plan]]) -> str:
    lines = [
        f"| {head} | planned, MiB | run again | measured | off by |",
        f"|{'---|' * (head.count('|') + 1)}---:|---:|---:|---:|",
    ]
    for name, row, plan in found:
        planned, measured = allocated_mib(plan), row["peak_mib"]
        lines.append(
            f"| {row['model']} | {name} | {planned:,.0f} | {plan.recomputed} blocks | "
            f"{measured:,.0f} | {100 * (planned / measured - 1):+.2f} % |"
        )
    return "\n".join(lines)


def _run_of(row: Row, case: Case, provider: Provider) -> dict[str, Any]:
    """What a provider's run differs in from the planned configurations' usual."""
    shape, parts, graphs = row["shape"], provider.accumulate, provider.graphs
    return _of_texts(
        case.method,
        nf4=case.method == "lora" and not provider.dense,
        layers=case.layers,
        sft={"context": shape["length"], "activations": provider.activations},
        train={
            "batch_size": shape["rows"] // parts,
            "accumulate": parts,
            "optimizer": optimizer_of(case, row["model"], provider),
            "rounding": provider.rounding,
            "in_backward": provider.in_backward,
            "cuda_graph": "auto" if graphs is None else graphs,
        },
    )


def _of_texts(
    method: str, *, nf4: bool, layers: str, sft: dict[str, Any], train: dict[str, Any]
) -> dict[str, Any]:
    """Fine-tuning as the benches have it."""
    return {
        "objective": "sft",
        "method": method,
        # the benches' NF4 weights have an absmax of 8 bits
        "quantize": "nf4" if nf4 else "none",
        "double_quant": nf4,
        "lora": {"layers": layers},
        "sft": sft,
        "train": train,
    }
