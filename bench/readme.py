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
        lines.append(f"| {name} | {_time(published)} | {_time(ours)} | **{ratio:,.0f} x** |")
    return "\n".join(lines)


def _time(row: dict[str, float]) -> str:
    ms = row["ms"]
    if ms < 1e3:
        return f"{ms:.0f} ms"
    return f"{ms / 1e3:.1f} s" if ms < 120e3 else f"{ms / 60e3:.0f} min"


def output_of(name: str) -> str:
    """What a command printed, from ``docs/output``."""
    text = (README.parent / "docs" / "output" / f"{name}.txt").read_text(encoding="utf-8")
    return f"```\n{text.rstrip()}\n```"


TABLES = {"published": published_table}


def fill(text: str) -> str:
    """Replace what stands between the markers of each table and of each command's output."""

    def filled(match: re.Match[str]) -> str:
        begin, kind, name, end = match.groups()
        return begin + (TABLES[name]() if kind == "bench" else output_of(name)) + "\n" + end

    pattern = r"(<!-- (bench|output) (\w+) -->\n).*?(<!-- /(?:bench|output) -->)"
    return re.sub(pattern, filled, text, flags=re.DOTALL)


def main() -> None:
    Path(README).write_text(fill(README.read_text(encoding="utf-8")), encoding="utf-8")
