"""What the project set out to reach on one H100, beside what its committed results say."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# of the fast NF4 product, x cuBLAS on a resident bf16 copy; by millions of weights, then by tokens
_PRODUCT = {
    ("over 100 M", 100.0, math.inf): {
        1: (2.9, 2.9), 16: (3.1, 2.8), 64: (2.7, 2.4), 128: (1.9, 1.8), 256: (1.15, 1.15),
        512: (1.0, 1.0), 1024: (1.0, 1.0), 4096: (0.98, 0.98),
    },
    ("58-67 M", 50.0, 100.0): {
        1: (2.5, 2.5), 16: (2.5, 2.4), 64: (2.1, 2.0), 128: (1.9, 1.7), 256: (1.2, 1.15),
        512: (1.0, 1.0), 1024: (1.0, 1.0), 4096: (0.98, 0.98),
    },
    ("17-25 M", 0.0, 50.0): {
        1: (1.8, 1.8), 16: (2.0, 2.0), 64: (1.6, 1.6), 128: (1.2, 1.2), 256: (1.05, 1.05),
        512: (1.0, 1.0), 1024: (1.0, 1.0), 4096: (0.98, 0.98),
    },
}  # fmt: skip
# of decoding a weight and cuBLAS, x cuBLAS on a resident bf16 copy; by tokens
_DECODED = {4096: 0.88, 8192: 0.93}
# of Triton's fused forward product up to 64 tokens, and of conversions, by millions of weights from which
# they hold: shares of copy bandwidth, and x bitsandbytes
_TRITON, _LARGE = 1.6, 58.0
_CONVERSIONS = {
    "dequantise": ("nf4_dequantize", "dequantize", "tli-engine", 0.92, 1.25),
    "dequantise, absmax quantised too": (
        "nf4_dequantize", "dequantize-double", "tli-engine", 0.92, 1.35,
    ),
    "quantise": ("nf4_quantize", "quantize", "tli-engine:graph", 0.85, 1.0),
}  # fmt: skip
# share by which exact may take longer than fast, by direction, up to 128 tokens and from 256 on
_EXACT = {"fwd": (0.15, 0.08), "dx": (0.25, 0.12)}
# times of a step over the time that its weights' bytes and its operations take
_STEP_FLOORS = {64: 2.5, 256: 2.5, 4125: 1.5}
# x the published scan and evaluation; times of a scan over its forward pass, or that pass' floor
_SCAN, _EVALUATION, _OVER_FORWARD = 5000.0, 300.0, 1.3


def rows_of(folder: Path, op: str) -> list[dict[str, Any]]:
    """The committed rows of a bench."""
    rows: list[dict[str, Any]] = json.loads((folder / f"{op}.json").read_text())["rows"]
    return rows


def _of_size(
    rows: Iterable[dict[str, Any]], least: float, most: float = math.inf
) -> list[dict[str, Any]]:
    """Those of matrices with so many millions of weights, ``most`` left out."""
    return [r for r in rows if least <= r["shape"]["N"] * r["shape"]["K"] / 1e6 < most]


def _over_cublas(
    rows: Iterable[dict[str, Any]], case: str, tokens: int, provider: str
) -> list[float]:
    """CuBLAS' time over a provider's, for each shape."""
    ms = {
        (r["model"], r["provider"]): r["ms"]
        for r in rows
        if (r["case"], r["shape"]["M"]) == (case, tokens)
    }
    return [time / ms[model, provider] for (model, of), time in ms.items() if of == "cublas-bf16"]


def judged(values: Iterable[float], goal: float, at_least: bool = True) -> str:
    """A range, in bold where all of it is as good as the goal, before rounding.

    Two digits, none of large goals, and more where a miss would look like the goal.
    """
    found = list(values)
    low, high = min(found), max(found)

    def met(worst: float) -> bool:
        return worst >= goal if at_least else worst <= goal

    worst = low if at_least else high
    digits = usual = 2 if goal < 100 else 0
    while met(round(worst, digits)) and not met(worst):
        digits += 1
    first, last = (f"{v:,.{digits if v == worst else usual}f}" for v in (low, high))
    shown = first if first == last else f"{first}-{last}"
    return f"**{shown}**" if met(worst) else shown


def product_table(folder: Path) -> str:
    """The NF4 product in fast numerics: goals, and the lowest and highest ratio over the shapes."""
    rows = rows_of(folder, "nf4_linear")
    lines = [
        "| weights | tokens | goal, forward | reached | goal, dX | reached |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for (title, least, most), goals in _PRODUCT.items():
        sized = _of_size(rows, least, most)
        for tokens, by_case in goals.items():
            cells = []
            for case, goal in zip(("fwd", "dx"), by_case, strict=True):
                ratios = _over_cublas(sized, case, tokens, "tli-engine:fast")
                cells.append(f"{goal:g} | {judged(ratios, goal)}")
            lines.append(f"| {title} | {tokens:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def exact_table(folder: Path) -> str:
    """What exact numerics take on top of fast ones, over all shapes."""
    rows = rows_of(folder, "nf4_linear")
    ms = {(r["case"], r["model"], r["shape"]["M"], r["provider"]): r["ms"] for r in rows}
    lines = ["| direction | tokens | goal | reached |", "|---|---:|---:|---:|"]
    for case, goals in _EXACT.items():
        for title, goal, few in (("1-128", goals[0], True), ("256-4,096", goals[1], False)):
            more = [
                time / ms[of, model, tokens, "tli-engine:fast"] - 1
                for (of, model, tokens, provider), time in ms.items()
                if (of, provider) == (case, "tli-engine") and (tokens <= 128) == few
            ]
            name = "forward" if case == "fwd" else "dX"
            lines.append(f"| {name} | {title} | {goal:g} | {judged(more, goal, at_least=False)} |")
    return "\n".join(lines)


def decoded_table(*folders: Path) -> str:
    """Decoding and cuBLAS, as Triton's way takes many rows; the first folder that has a number of tokens."""
    measured = {folder.name.split("-")[1]: rows_of(folder, "nf4_linear") for folder in folders}
    lines = ["| tokens | GPU | goal | forward | dX |", "|---:|---|---:|---:|---:|"]
    for tokens, goal in _DECODED.items():
        name, rows = next(
            (name, rows)
            for name, rows in measured.items()
            if any(r["shape"]["M"] == tokens for r in rows)
        )
        cells = (
            judged(_over_cublas(rows, case, tokens, "tli-engine:triton"), goal)
            for case in ("fwd", "dx")
        )
        lines.append(f"| {tokens:,} | {name} | {goal:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def triton_table(folder: Path) -> str:
    """Triton's fused forward product on matrices of 58 M weights and more."""
    rows = _of_size(rows_of(folder, "nf4_linear"), _LARGE)
    lines = ["| tokens | goal | reached |", "|---:|---:|---:|"]
    for tokens in (1, 16, 64):
        ratios = _over_cublas(rows, "fwd", tokens, "tli-engine:triton")
        lines.append(f"| {tokens} | {_TRITON:g} | {judged(ratios, _TRITON)} |")
    return "\n".join(lines)


def conversion_table(folder: Path) -> str:
    """Quantising and dequantising matrices of 58 M weights and more."""
    lines = [
        "| | goal, share of copy bandwidth | reached | goal, x bitsandbytes | reached |",
        "|---|---:|---:|---:|---:|",
    ]
    for title, (op, case, provider, share, ratio) in _CONVERSIONS.items():
        rows = [
            r
            for r in _of_size(rows_of(folder, op), _LARGE)
            if (r["case"], r["provider"]) == (case, provider)
        ]
        shares = judged((r["roofline"] for r in rows), share)
        ratios = judged((r["ratio_to_baseline"] for r in rows), ratio)
        lines.append(f"| {title} | {share:g} | {shares} | {ratio:g} | {ratios} |")
    return "\n".join(lines)


def lora_table(folder: Path) -> str:
    """What the update adds to the frozen layer: the product by itself, and forward and backward."""
    rows = rows_of(folder, "nf4_lora_linear")
    lines = [
        "| layer | tokens | product with the update in it (goal 0.06 from 256 on) | goal, forward and backward | reached |",
        "|---|---:|---:|---:|---:|",
    ]
    added = {
        (r["model"], r["shape"]["M"], r["case"], r["provider"]): r["notes"]["over_frozen"]
        for r in rows
        if "over_frozen" in r["notes"]
    }
    for model, tokens, case, provider in added:
        if (case, provider) != ("fwd_bwd", "tli-engine"):
            continue
        product = added[model, tokens, "fwd", "tli-engine:epilogue"]
        goal = {64: 0.15, 4096: 0.08}.get(tokens)
        whole = added[model, tokens, "fwd_bwd", "tli-engine"]
        reached = f"{whole:.2f}" if goal is None else judged([whole], goal, at_least=False)
        lines.append(
            f"| {model} | {tokens:,} | {judged([product], 0.06, at_least=False)} | "
            f"{'' if goal is None else format(goal, 'g')} | {reached} |"
        )
    return "\n".join(lines)


def step_table(*folders: Path) -> str:
    """The align step's time over its floor; a column a GPU, rows are the first one's."""
    ours = {"tli-engine": "exact", "tli-engine:fast": "fast", "tli-engine:bf16": "resident in bf16"}
    measured = [
        {
            (r["model"].split()[0], r["shape"]["tokens"], r["provider"]): r["roofline"]
            for r in rows_of(folder, "tli_step")
            if r["case"] == "step" and r["provider"] in ours and r.get("roofline")
        }
        for folder in folders
    ]
    names = " | ".join(_gpu_of(folder) for folder in folders)
    lines = [
        f"| shape | tokens | numerics | goal | {names} |",
        f"|---|---:|---|---:|{'---:|' * len(folders)}",
    ]
    for key in measured[0]:
        model, tokens, provider = key
        goal = _STEP_FLOORS[tokens]
        shares = [of_gpu.get(key) for of_gpu in measured]
        cells = (_over_floor(share, goal) for share in shares)
        lines.append(
            f"| {model} | {tokens:,} | {ours[provider]} | {goal:g} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def _gpu_of(folder: Path) -> str:
    return folder.name.split("-")[1]


def _over_floor(share: float | None, goal: float) -> str:
    """How many times the floor a time is that the floor is a ``share`` of."""
    return "not measured" if not share else judged([1 / share], goal, at_least=False)


def scan_table(*folders: Path) -> str:
    """The scan and the evaluation against the published ones, and many words at once."""
    lines = [
        "| | GPU | goal | reached | time | GPU busy | peak of GPU memory |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for folder in folders:
        rows = {(r["case"], r["provider"]): r for r in rows_of(folder, "tli_scan")}
        scan, forward = rows["scan", "tli-engine"], rows["scan", "tli-engine:forward"]
        evaluation = rows["evaluate", "tli-engine"]
        pairs, both = (row["shape"]["pairs"] for row in (scan, evaluation))
        over_forward = judged([scan["ms"] / forward["ms"]], _OVER_FORWARD, at_least=False)
        reached = (
            (f"scan of {pairs} pairs, x published", _SCAN, _ratio(scan, _SCAN), scan),
            ("the same, x its forward pass", _OVER_FORWARD, over_forward, forward),
            (
                "the same, x the floor of its products",
                _OVER_FORWARD,
                _over_floor(scan.get("roofline"), _OVER_FORWARD),
                None,
            ),
            (
                f"evaluation of {both} pairs, x published",
                _EVALUATION,
                _ratio(evaluation, _EVALUATION),
                evaluation,
            ),
        )
        for title, goal, value, row in reached:
            cells = ["", "", ""] if row is None else _taken(row)
            lines.append(
                f"| {title} | {_gpu_of(folder)} | {goal:,g} | {value} | {' | '.join(cells)} |"
            )
    return "\n".join([*lines, *_many_lines(folders)])


def _ratio(row: dict[str, Any], goal: float) -> str:
    return judged([row["ratio_to_baseline"]], goal)


def _taken(row: dict[str, Any]) -> list[str]:
    """Time, that of it in which the GPU is busy, and memory; earlier rows have only the first."""
    busy, peak = row.get("gpu_ms"), row.get("peak_mib")
    return [
        f"{row['ms'] / 1e3:.2f} s",
        "not measured" if busy is None else f"{busy / 1e3:.2f} s",
        "not measured" if peak is None else f"{peak / 1024:.1f} GiB",
    ]


def _many_lines(folders: Iterable[Path]) -> list[str]:
    """Scans of many words, which have no ratio."""
    found = [
        (folder, row)
        for folder in folders
        if (folder / "tli_scan_many.json").is_file()
        for row in rows_of(folder, "tli_scan_many")
    ]
    if not found:
        return ["| scan of 100,000 words, once | | | not measured | | | |"]
    return [
        f"| scan of {row['shape']['words']:,} words, once | {_gpu_of(folder)} | | | {' | '.join(_taken(row))} |"
        for folder, row in found
    ]
