"""What fine-tuning and generation set out to reach, beside what the committed results say."""

from pathlib import Path
from typing import Any

from bench.goals import judged, rows_of

Row = dict[str, Any]
_SHAPE, _SMALL = "llama-3-8b", "qwen2-1.5b"
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


def full_tuning_table(folder: Path) -> str:
    """Adapters on few blocks beside weights in bf16, and beside full fine-tuning."""
    rows = {(r["model"], r["case"], r["provider"]): r for r in rows_of(folder, "train_step")}
    lines = ["| model | goal | reached |", "|---|---|---:|"]

    def line(model: str, goal: str, ours: Row | None, theirs: Row | None, number: float) -> None:
        lines.append(f"| {model} | {goal} | {_beside(ours, theirs, number)} |")

    def engine(model: str, case: str, how: str = "") -> Row | None:
        return rows.get((model, case, _OURS + how))

    early, dense = engine(_SHAPE, "lora_early"), engine(_SHAPE, "lora_early", ":bf16")
    line(_SHAPE, "blocks 0-2 in NF4: 0.95 x the rate of weights in bf16", early, dense, 0.95)
    line(_SHAPE, "the same: half of their memory", early, dense, -0.5)
    # the engine's own choice keeps all of either
    for how, named in (("", "all activations kept"), (":recompute", "blocks run again")):
        both = engine(_SMALL, "lora_early", how), engine(_SMALL, "full", how)
        line(_SMALL, f"blocks 0-2, {named}: 1.25 x full fine-tuning's rate", *both, 1.25)
        line(_SMALL, f"blocks 0-2, {named}: a quarter of its memory", *both, -0.25)
    of_full = [r for (model, case, _), r in rows.items() if (model, case) == (_SMALL, "full")]
    peers = [r for r in of_full if not r["provider"].startswith(_OURS)]
    fastest = max(peers, key=_rate, default=None)
    line(_SMALL, "full fine-tuning: 1.1 x the fastest peer", engine(_SMALL, "full"), fastest, 1.1)
    return "\n".join(lines)


def _beside(ours: Row | None, theirs: Row | None, goal: float) -> str:
    """The ratio of rates, or for a negative goal, which is not to be exceeded, of memory."""
    if ours is None or theirs is None:
        return "not measured"
    if goal < 0:
        return judged([ours["peak_mib"] / theirs["peak_mib"]], -goal, at_least=False)
    return judged([_rate(ours) / _rate(theirs)], goal)


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


def _rate(row: Row) -> float:
    rate: float = row["notes"]["tokens_per_s"]
    return rate


def _name(row: Row) -> str:
    return f"{row['provider']}, {_rate(row):,.0f} tokens/s, {row['peak_mib'] / 1024:.1f} GiB"


def _fastest(rows: list[Row], case: str, most_mib: float, *, ours: bool) -> Row:
    """Who is the fastest of the engine's in NF4, or of its peers, within so much memory."""
    found = (
        r
        for r in rows
        if r["case"] == case
        and r["provider"].startswith(_OURS) == ours
        and not (ours and "bf16" in r["provider"])
        and r["peak_mib"] <= most_mib
    )
    return max(found, key=_rate)
