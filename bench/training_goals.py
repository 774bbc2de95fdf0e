"""What fine-tuning, generation and plans set out to reach, beside what the committed results say."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.goals import judged, rows_of
from bench.models import config_of
from bench.plan_cases import PlanCase, plan_config
from bench.train_cases import CASES, providers_of
from tli_engine.models.survey import Survey
from tli_engine.train.plan import Plan, limited, make_plan
from tli_engine.train.plan_devices import NAMES, find_target

Row = dict[str, Any]
_SHAPE = "llama-3-8b"
_TRAINED = {"lora_early": "blocks 0-2", "lora_all": "all blocks"}
_OURS = "tli-engine"
# x the fastest peer, within so many GiB
_OVER_PEERS = {"lora_early": (1.2, 12), "lora_all": (1.25, 41)}
# share of the rate of products alone, nothing run again; x Unsloth in what it takes
_OF_FLOOR, _OVER_UNSLOTH = 0.85, 1.2
# generation: x transformers and bitsandbytes in NF4, x transformers with a static cache in bf16
_OVER_NF4, _OVER_STATIC = ("transformers+bitsandbytes", 10.0), ("transformers:static", 1.3)


def fine_tuning_table(folder: Path) -> str:
    """Fine-tuning on summaries, a step of 4 rows of 2,048 tokens."""
    rows = [r for r in rows_of(folder, "train_step") if r["model"] == _SHAPE]
    lines = ["| adapters on | goal | reached | by | against |", "|---|---|---:|---|---|"]

    def line(case: str, goal: str, *cells: str) -> None:
        lines.append(f"| {_TRAINED[case]} | {goal} | {' | '.join(cells)} |")

    for case, (goal, gib) in _OVER_PEERS.items():
        ours, peer = (_fastest(rows, case, 1024 * gib, ours=ours) for ours in (True, False))
        ratio = _rate(ours) / _rate(peer)
        apart = ours["notes"].get("losses_apart")
        # what trains otherwise has reached nothing
        reached = f"{ratio:.2f}, losses {apart:.2f} apart" if apart else judged([ratio], goal)
        cells = reached, _name(ours), _name(peer)
        line(case, f"{goal:g} x the fastest peer within {gib} GiB", *cells)
        if case == "lora_early":
            ours = _fastest(rows, case, 1024 * _OVER_PEERS["lora_all"][1], ours=True)
            goal_of_rate = f"{_OF_FLOOR:g} of the rate of its products alone within 41 GiB"
            line(case, goal_of_rate, judged([ours["roofline"]], _OF_FLOOR), _name(ours), "")
    unsloth = [r for r in rows if (r["case"], r["provider"]) == ("lora_all", "unsloth")]
    goal_of_unsloth = f"{_OVER_UNSLOTH:g} x Unsloth within its memory"
    if not unsloth:
        line("lora_all", goal_of_unsloth, "not measured", "", "")
    for peer in unsloth:
        ours = _fastest(rows, "lora_all", peer["peak_mib"], ours=True)
        ratio = judged([_rate(ours) / _rate(peer)], _OVER_UNSLOTH)
        line("lora_all", goal_of_unsloth, ratio, _name(ours), _name(peer))
    return "\n".join(lines)


def generation_table(folder: Path) -> str:
    """Greedy generation, prompts left out."""
    rates = {(r["provider"], r["shape"]["batch"]): _rate(r) for r in rows_of(folder, "generation")}
    lines = ["| x tokens/s of | goal | texts | reached |", "|---|---:|---:|---:|"]
    for peer, goal in (_OVER_NF4, _OVER_STATIC):
        for of, texts in rates:
            if of != _OURS:
                continue
            rate = rates.get((peer, texts))
            ratio = "not measured" if rate is None else judged([rates[of, texts] / rate], goal)
            lines.append(f"| {peer} | {goal:g} | {texts} | {ratio} |")
    return "\n".join(lines)


def planned_peaks(folder: Path) -> Iterator[tuple[Row, Plan]]:
    """The engine's measured steps of fine-tuning, and what the planner says of each today."""
    names = (n for n in NAMES if find_target(n, "auto").results == folder.name)
    device = find_target(next(names), "auto")
    for row in rows_of(folder, "train_step"):
        case = CASES[row["case"]]
        of_case = {p.name: p for p in providers_of(case, row["model"]) if p.kind == "engine"}
        provider = of_case.get(row["provider"])
        # no run computes in fp32 with these weights
        if provider is None or provider.fp32:
            continue
        shape, parts, graphs = row["shape"], provider.accumulate, provider.graphs
        # the bench's weights are quantised with an absmax of 8 bits
        values: dict[str, Any] = {
            "objective": "sft",
            "quantize": "nf4",
            "double_quant": True,
            "lora": {"layers": case.layers},
            "sft": {"context": shape["length"], "activations": provider.activations},
            "train": {
                "batch_size": shape["rows"] // parts,
                "accumulate": parts,
                "cuda_graph": "auto" if graphs is None else graphs,
            },
        }
        run = plan_config(PlanCase(row["case"], row["model"], values))
        model = Survey(row["model"], config_of(row["model"]), None)
        yield row, make_plan(run, model, limited(device, provider.memory_gib or None))


def allocated_mib(plan: Plan) -> float:
    """What a plan says that torch will have allocated, MiB."""
    return (sum(plan.gpu_bytes.values()) - plan.gpu_bytes["cuda_context"]) / 2**20


def peaks_table(folder: Path) -> str:
    """Peaks of fine-tuning: the planner's beside the measured ones."""
    lines = [
        "| adapters on | who | planned, MiB | run again | measured | off by |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row, plan in planned_peaks(folder):
        planned, measured = allocated_mib(plan), row["peak_mib"]
        lines.append(
            f"| {_TRAINED[row['case']]} | {row['provider']} | {planned:,.0f} | {plan.recomputed} blocks | "
            f"{measured:,.0f} | {100 * (planned / measured - 1):+.2f} % |"
        )
    return "\n".join(lines)


def _rate(row: Row) -> float:
    rate: float = row["notes"]["tokens_per_s"]
    return rate


def _name(row: Row) -> str:
    return f"{row['provider']}, {_rate(row):,.0f} tokens/s, {row['peak_mib'] / 1024:.1f} GiB"


def _fastest(rows: list[Row], case: str, most_mib: float, *, ours: bool) -> Row:
    """Who is the fastest of the engine's, or of its peers, within so much memory."""
    found = (
        r
        for r in rows
        if r["case"] == case
        and r["provider"].startswith(_OURS) == ours
        and r["peak_mib"] <= most_mib
    )
    return max(found, key=_rate)
