"""Fills in the README's tables and output from committed files: ``python -m bench readme``."""

import json
import re
from pathlib import Path

from bench.harness import RESULTS

README = RESULTS.parent.parent / "README.md"


def published_table() -> str:
    """The scan and the step against the published procedure, on a CPU."""
    lines = [
        "| | published procedure | tli-engine | ratio |",
        "|---|---:|---:|---:|",
    ]
    titles = {
        "tli_scan": "scan, {pairs:,} pairs x {layers} layers",
        "tli_step": "training step, {pairs} pairs, `hidden_states[{layer}]`",
    }
    for op, title in titles.items():
        rows = json.loads((RESULTS / "cpu" / f"{op}.json").read_text())["rows"]
        by_provider = {row["provider"]: row for row in rows}
        published, ours = by_provider["published"], by_provider["tli-engine"]
        name = title.format(**ours["shape"])
        ratio = ours["ratio_to_baseline"]
        # two digits: a shared machine's times are no better than that
        shown = f"{float(f'{ratio:.2g}'):,.0f}"
        lines.append(f"| {name} | {_time(published)} | {_time(ours)} | **{shown} x** |")
    return "\n".join(lines)


def _time(row: dict[str, float]) -> str:
    ms = row["ms"]
    if ms < 1e3:
        return f"{ms:.0f} ms"
    return f"{ms / 1e3:.1f} s" if ms < 120e3 else f"{ms / 60e3:.0f} min"


_TOKENS = (1, 16, 64, 128, 256, 1024, 4096, 8192)


def nf4_table() -> str:
    """NF4 matmuls by dispatch over all shapes measured, lowest to highest ratio."""
    rows = json.loads((RESULTS / "NVIDIA-H200" / "nf4_linear.json").read_text())["rows"]
    ms = {(r["case"], r["model"], r["shape"]["M"], r["provider"]): r["ms"] for r in rows}
    columns = [(case, peer) for case in ("fwd", "dx") for peer in ("cublas-bf16", "bitsandbytes")]
    lines = [
        "| tokens | forward, x cuBLAS bf16 | x bitsandbytes | dX, x cuBLAS bf16 | x bitsandbytes |",
        "|---:|---:|---:|---:|---:|",
    ]
    for tokens in _TOKENS:
        cells = []
        for case, peer in columns:
            ratios = [
                time / ms[case, model, tokens, "tli-engine"]
                for (of_case, model, of_tokens, provider), time in ms.items()
                if (of_case, of_tokens, provider) == (case, tokens, peer)
            ]
            cells.append(f"{min(ratios):.2f}-{max(ratios):.2f}" if ratios else "-")
        lines.append(f"| {tokens:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def output_of(name: str) -> str:
    """What a command printed, from ``docs/output``."""
    text = (README.parent / "docs" / "output" / f"{name}.txt").read_text(encoding="utf-8")
    return f"```\n{text.rstrip()}\n```"


TABLES = {"published": published_table, "nf4": nf4_table}


def fill(text: str) -> str:
    """Replace what stands between the markers of each table and of each command's output."""

    def filled(match: re.Match[str]) -> str:
        begin, kind, name, end = match.groups()
        return begin + (TABLES[name]() if kind == "bench" else output_of(name)) + "\n" + end

    pattern = r"(<!-- (bench|output) (\w+) -->\n).*?(<!-- /(?:bench|output) -->)"
    return re.sub(pattern, filled, text, flags=re.DOTALL)


def main() -> None:
    Path(README).write_text(fill(README.read_text(encoding="utf-8")), encoding="utf-8")
