"""A comparison of tiny models: its configuration and articles, and what makes it quick."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tli_engine.cli import main

ARTICLES = [
    ("Mvua kubwa imenyesha mjini leo asubuhi. Barabara zimejaa maji.", "Mvua mjini"),
    ("Timu ya taifa imeshinda mchezo wake wa kwanza.", "Timu yashinda"),
    ("Bei ya mahindi imepanda tena sokoni.", "Mahindi yapanda"),
    ("Shule zitafunguliwa wiki ijayo kote nchini.", "Shule kufunguliwa"),
    ("Daraja jipya limefunguliwa juu ya mto.", "Daraja lafunguliwa"),
    ("Wakulima wanasubiri mvua za masika.", "Wakulima wasubiri"),
]


def in_this_process(comparison: Any, parts: list[str], jobs: int) -> dict[str, int]:
    """What runs parts, without the seconds that a process of its own takes to begin."""
    given = ["compare", str(comparison.out / "compare.yaml"), "--out", str(comparison.out)]
    given += ["--side-by-side", str(jobs)]
    return {part: main([*given, "--only", part]) for part in parts}


def without_plots(patch: pytest.MonkeyPatch) -> None:
    """Drawing is most of the time that a tiny model takes."""
    nothing = "tli_engine.cli._train_sft.plot_losses", "tli_engine.cli._train_align.plot_training"
    for name in (*nothing, "tli_engine.cli._evaluate.plot_histograms"):
        # the path comes last
        patch.setattr(name, lambda *values: values[-1].write_bytes(b""))


def write_comparison(folder: Path, model: Path, pairs: Path) -> Path:
    """Write a configuration of all arms with one seed, and its articles."""
    for name, rows in (("train", ARTICLES[:3]), ("unseen", ARTICLES[3:4]), ("test", ARTICLES[4:])):
        lines = [json.dumps({"text": text, "summary": summary}) for text, summary in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    names = {"texts": "train", "validation": "unseen", "test": "test"}
    values = {
        "model": str(model),
        "device": "cpu",
        "data": {k: str(folder / f"{v}.jsonl") for k, v in names.items()} | {"pairs": str(pairs)},
        "prompt": {"instruction": "Fupisha: {text}"},
        "lora": {"layers": "0-1", "r": 4, "alpha": 8},
        "sft": {"context": 96, "evaluate_steps": 2},
        "train": {"steps": 3, "batch_size": 1, "learning_rate": 1e-2, "checkpoint_steps": 2},
        "compare": {
            "seeds": [5],
            "max_new_tokens": 4,
            "set": {
                "full": {"train": {"learning_rate": 1e-3}},
                "tli": {"train": {"epochs": 1, "batch_size": 4}},
            },
        },
    }
    (folder / "compare.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return folder / "compare.yaml"
