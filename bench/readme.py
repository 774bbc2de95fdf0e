"""Fills in tables and output of the README and of docs/goals.md from committed files: ``python -m bench readme``."""

import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench import goals, plan_goals, training_goals
from bench.bench_scaling import HOW
from bench.harness import RESULTS

README = RESULTS.parent.parent / "README.md"
DOCS = README.parent / "docs"
FILLED = (
    README,
    *(DOCS / name for name in ("goals.md", "several-gpus.md", "comparisons/README.md")),
)


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
        case = op.removeprefix("tli_")
        by_provider = {row["provider"]: row for row in rows if row["case"] == case}
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


_TOKENS = (1, 16, 64, 128, 256, 512, 1024, 4096)
# matrices by millions of weights
_SIZES = (("over 100 M", 100, math.inf), ("58-67 M", 50, 100), ("17-25 M", 0, 50))
_GPU, _H200 = RESULTS / "NVIDIA-H100-80GB-HBM3", RESULTS / "NVIDIA-H200"


def _gpu_rows(op: str, of: Path = _GPU) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((of / f"{op}.json").read_text())["rows"]
    return rows


def _range(ratios: list[float]) -> str:
    return f"{min(ratios):.2f}-{max(ratios):.2f}" if ratios else "-"


def _nf4_table(columns: list[tuple[str, str, str, str]]) -> str:
    """Ratios over all shapes measured; columns are title, case, provider and peer."""
    rows = _gpu_rows("nf4_linear")
    ms = {(r["case"], r["model"], r["shape"]["M"], r["provider"]): r["ms"] for r in rows}
    lines = [
        f"| tokens | {' | '.join(title for title, *_ in columns)} |",
        f"|---:|{'---:|' * len(columns)}",
    ]
    for tokens in _TOKENS:
        cells = [
            _range(
                [
                    time / ms[case, model, tokens, provider]
                    for (of_case, model, of_tokens, of), time in ms.items()
                    if (of_case, of_tokens, of) == (case, tokens, peer)
                ]
            )
            for _, case, provider, peer in columns
        ]
        lines.append(f"| {tokens:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def nf4_table() -> str:
    """NF4 matmuls by dispatch."""
    ours, cublas = "tli-engine", "cublas-bf16"
    return _nf4_table(
        [
            ("forward, exact, x cuBLAS", "fwd", ours, cublas),
            ("fast", "fwd", f"{ours}:fast", cublas),
            ("exact, x bitsandbytes", "fwd", ours, "bitsandbytes"),
            ("x Unsloth", "fwd", ours, "unsloth"),
            ("dX, exact, x cuBLAS", "dx", ours, cublas),
            ("fast", "dx", f"{ours}:fast", cublas),
            ("exact, x bitsandbytes", "dx", ours, "bitsandbytes"),
            ("x Unsloth", "dx", ours, "unsloth"),
        ]
    )


def sizes_table() -> str:
    """The fast forward against cuBLAS, by the size of the matrix."""
    rows = _gpu_rows("nf4_linear")
    forward = {
        (r["shape"]["N"], r["shape"]["K"], r["shape"]["M"], r["provider"]): r["ms"]
        for r in rows
        if r["case"] == "fwd"
    }
    lines = [
        f"| weights, by tokens | {' | '.join(f'{tokens:,}' for tokens in _TOKENS)} |",
        f"|---|{'---:|' * len(_TOKENS)}",
    ]
    for title, least, most in _SIZES:
        cells = [
            _range(
                [
                    forward[N, K, tokens, "cublas-bf16"] / time
                    for (N, K, M, of), time in forward.items()
                    if tokens == M and of == "tli-engine:fast" and least <= N * K / 1e6 < most
                ]
            )
            for tokens in _TOKENS
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def triton_table() -> str:
    """NF4 matmuls in Triton, exact."""
    ours = "tli-engine:triton"
    return _nf4_table(
        [
            ("forward, x cuBLAS", "fwd", ours, "cublas-bf16"),
            ("x bitsandbytes", "fwd", ours, "bitsandbytes"),
            ("dX, x cuBLAS", "dx", ours, "cublas-bf16"),
            ("x bitsandbytes", "dx", ours, "bitsandbytes"),
        ]
    )


def lora_table() -> str:
    """A layer with LoRA, forward and backward."""
    lines = [
        "| layer | tokens | PEFT + bitsandbytes | Unsloth | tli-engine | ratio | the update adds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    rows = _gpu_rows("nf4_lora_linear")
    us = {
        (r["model"], r["shape"]["M"], r["provider"]): r["ms"] * 1e3
        for r in rows
        if r["case"] == "fwd_bwd"
    }
    for (model, tokens, provider), time in us.items():
        if provider == "tli-engine":
            peers = [us[model, tokens, peer] for peer in ("peft+bitsandbytes", "unsloth")]
            added = 100 * (time / us[model, tokens, "tli-engine:frozen"] - 1)
            cells = " | ".join(f"{us:,.0f} µs" for us in (*peers, time))
            cells += f" | **{min(peers) / time:.2f} x** | {added:.0f} %"
            lines.append(f"| {model} | {tokens:,} | {cells} |")
    return "\n".join(lines)


def words_table() -> str:
    """Attention within words, forward and backward, against the fastest peer."""
    lines = [
        "| shape | tokens | forward | x fastest peer | backward | x fastest peer |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    rows = _gpu_rows("word_attention")
    us = {(r["model"], r["shape"]["T"], r["case"], r["provider"]): r["ms"] * 1e3 for r in rows}
    for model, tokens in dict.fromkeys((m, t) for m, t, *_ in us):
        cells = []
        for case in ("fwd", "bwd"):
            peers = [us[model, tokens, case, p] for p in ("padded", "masked", "varlen")]
            time = us[model, tokens, case, "tli-engine"]
            cells.append(f"{time:.1f} µs | {min(peers) / time:.1f} x")
        lines.append(f"| {model} | {tokens} | {' | '.join(cells)} |")
    return "\n".join(lines)


def steps_table() -> str:
    """The training step of word pairs on a GPU, against the published one and its cut."""
    rows = [r for r in _gpu_rows("tli_step", _H200) if r["case"] == "step"]
    by_key = {(r["model"], r["shape"]["tokens"], r["provider"]): r for r in rows}
    lines = [
        "| tokens a step | published | cut to two blocks | tli-engine, exact | fast | weights resident in bf16 |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    model = next(r["model"] for r in rows if r["provider"] == "published")
    for tokens in dict.fromkeys(t for m, t, _ in by_key if m == model):
        names = (
            "published",
            "peft+bitsandbytes",
            "tli-engine",
            "tli-engine:fast",
            "tli-engine:bf16",
        )
        cells = [_wall_and_gpu(by_key[model, tokens, name]) for name in names]
        lines.append(f"| {tokens:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _wall_and_gpu(row: dict[str, Any]) -> str:
    def shown(ms: float) -> str:
        return f"{ms:.0f}" if ms >= 20 else f"{ms:.1f}" if ms >= 5 else f"{ms:.2f}"

    return f"{shown(row['ms'])} ms ({shown(row['gpu_ms'])})"


def sft_table() -> str:
    """The step of fine-tuning on a GPU, peers beside."""
    lines = [
        "| model | trained | who | tokens/s | a step (GPU busy) | peak memory |",
        "|---|---|---|---:|---:|---:|",
    ]
    cases = {"lora_early": "blocks 0-2", "lora_all": "all blocks", "full": "all weights"}
    lines += [
        f"| {row['model']} | {cases[row['case']]} | {row['provider']} | "
        f"{row['notes']['tokens_per_s']:,.0f} | {_wall_and_gpu(row)} | "
        f"{row['peak_mib'] / 1024:.1f} GiB |"
        for row in _gpu_rows("train_step", _H200)
    ]
    return "\n".join(lines)


def generation_table() -> str:
    """Greedy generation on a GPU, peers beside."""
    lines = [
        "| texts | who | tokens/s | a step | GPU busy | share of the floor | peak memory |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in _gpu_rows("generation"):
        notes = row["notes"]
        lines.append(
            f"| {row['shape']['batch']} | {row['provider']} | {notes['tokens_per_s']:,.0f} | "
            f"{row['ms']:.2f} ms | {row['gpu_ms']:.2f} ms | {row['roofline']:.2f} | "
            f"{row['peak_mib'] / 1024:.1f} GiB |"
        )
    return "\n".join(lines)


def scaling_table() -> str:
    """Fine-tuning on one GPU and on two."""
    lines = [
        "| model | trained | tokens a GPU and step | GPUs | tokens/s | a step | of linear | peak of each GPU |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    trained = {
        "lora": "adapters on all blocks, NF4",
        "full": "all weights",
        "full_8b": "all weights",
        "qlora_sharded": "adapters on all blocks, NF4 in shares",
    }
    for row in _gpu_rows("scaling", _H200):
        notes, gpus = row["notes"], row["shape"]["gpus"]
        tokens = row["shape"]["rows"] * row["shape"]["length"]
        # on two GPUs alone
        alone = row["case"] in ("full_8b", "qlora_sharded")
        lines.append(
            f"| {row['model']} | {trained[row['case']]}{HOW[row['provider']]} | {tokens:,} | {gpus} | "
            f"{notes['tokens_per_s']:,.0f} | {row['ms']:.0f} ms | {'' if alone else format(notes['efficiency'], '.2f')} | "
            f"{row['peak_mib'] / 1024:.1f} GiB |"
        )
    return "\n".join(lines)


_METRICS = {"rougeL": "ROUGE-L", "rouge1": "ROUGE-1", "bleu": "BLEU", "chrf": "chrF++"}


def comparison_table(name: str) -> str:
    """The arms of a comparison, and the systems that need no training."""
    found = json.loads((DOCS / "comparisons" / name / "report.json").read_text())
    p = {(t["arm"], t["metric"]): t["p_holm"] for t in found["tests"]}
    lines = [
        f"| | {' | '.join(_METRICS.values())} | trained | peak memory | training |",
        f"|---|{'---:|' * (len(_METRICS) + 3)}",
    ]
    for arm in found["arms"]:
        cells = [
            _scored(arm["text"][metric]) + _p_value(p.get((arm["name"], metric)))
            for metric in _METRICS
        ]
        seconds = f"{arm['wall_seconds']:.0f} s" if arm["side_by_side"] == 1 else "-"
        cells += [f"{arm['trainable_parameters']:,}", f"{arm['peak_mib']:,.0f} MiB", seconds]
        lines.append(f"| {arm['name']} | {' | '.join(cells)} |")
    for system, scores in found["baselines"].items():
        cells = [_scored(scores[metric]) for metric in _METRICS]
        lines.append(f"| {system} | {' | '.join(cells)} | | | |")
    return "\n".join(lines)


def _scored(score: dict[str, Any]) -> str:
    low, high = score["ci95"]
    return f"{score['score']:.1f} ({low:.1f}-{high:.1f})"


def _p_value(p: float | None) -> str:
    return "" if p is None else f", p = {p:.3f}" if p < 0.9995 else ", p = 1"


def output_of(name: str) -> str:
    """What a command printed, from ``docs/output``."""
    text = (README.parent / "docs" / "output" / f"{name}.txt").read_text(encoding="utf-8")
    return f"```\n{text.rstrip()}\n```"


TABLES: dict[str, Callable[[], str]] = {
    "published": published_table,
    "nf4": nf4_table,
    "sizes": sizes_table,
    "triton": triton_table,
    "lora": lora_table,
    "words": words_table,
    "steps": steps_table,
    "sft": sft_table,
    "generation": generation_table,
    "scaling": scaling_table,
    "comparison_gemma3": partial(comparison_table, "swahili-news-gemma3"),
    "comparison_smollm2": partial(comparison_table, "swahili-news-smollm2"),
    "product_goals": partial(goals.product_table, _GPU),
    "exact_goals": partial(goals.exact_table, _GPU),
    "triton_goals": partial(goals.triton_table, _GPU),
    "conversion_goals": partial(goals.conversion_table, _GPU),
    "decoded_goals": partial(goals.decoded_table, _GPU, _H200),
    "lora_goals": partial(goals.lora_table, _GPU),
    "step_goals": partial(goals.step_table, _H200, _GPU),
    "scan_goals": partial(goals.scan_table, _H200, _GPU),
    "fine_tuning_goals": partial(training_goals.fine_tuning_table, _H200),
    "full_tuning_goals": partial(training_goals.full_tuning_table, _H200),
    "generation_goals": partial(training_goals.generation_table, _GPU),
    "planned_errors": partial(plan_goals.errors_table, _H200),
    "planned_cases": partial(plan_goals.cases_table, _H200),
    "planned_peaks": partial(plan_goals.peaks_table, _H200),
    "planned_shares": partial(plan_goals.shares_table, _H200),
}


def table_of(name: str) -> str:
    """A table; where there are no results to make it of, how to make them."""
    try:
        return TABLES[name]()
    except FileNotFoundError as missing:
        return f"Not measured yet: `python -m bench {Path(str(missing.filename)).stem}`."


def fill(text: str) -> str:
    """Replace what stands between the markers of each table and of each command's output."""

    def filled(match: re.Match[str]) -> str:
        begin, kind, name, end = match.groups()
        return begin + (table_of(name) if kind == "bench" else output_of(name)) + "\n" + end

    pattern = r"(<!-- (bench|output) (\w+) -->\n).*?(<!-- /(?:bench|output) -->)"
    return re.sub(pattern, filled, text, flags=re.DOTALL)


def main() -> None:
    for document in FILLED:
        document.write_text(fill(document.read_text(encoding="utf-8")), encoding="utf-8")
