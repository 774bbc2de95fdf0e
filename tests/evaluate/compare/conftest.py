"""Runs that never were: figures and summaries that a comparison is made of."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tli_engine.data.texts import Article
from tli_engine.evaluate.compare.config import ARMS, CompareConfig
from tli_engine.evaluate.compare.gather import Part, gather

WORDS = [
    "mvua",
    "barabara",
    "shule",
    "mto",
    "soko",
    "timu",
    "daraja",
    "kijiji",
    "samaki",
    "bei",
    "wakulima",
    "mlima",
]
# words of each summary that an arm gets right, of six
RIGHT = {"full": 3, "lora-all": 3, "lora-early": 5, "tli-then-lora-early": 3, "joint": 1}

MakePart = Callable[..., Part]
MakeReport = Callable[..., dict[str, Any]]


def articles_of(count: int) -> list[Article]:
    generator = np.random.default_rng(0)
    summaries = [" ".join(generator.choice(WORDS, 6, replace=False)) for _ in range(count)]
    return [Article(f"Habari namba {i}. {s}.", s, f"line {i}") for i, s in enumerate(summaries)]


def predictions_of(articles: list[Article], right: int, seed: int) -> list[str]:
    generator = np.random.default_rng(seed)
    found = []
    for article in articles:
        words = article.summary.split()
        kept = generator.permutation(6) < right
        found.append(" ".join(w if k else "kesho" for w, k in zip(words, kept, strict=True)))
    return found


def alignment(change: float) -> dict[str, Any]:
    figures = {"separation": 0.2, "mrr": 0.4, "reverse": {"mrr": 0.4}}
    row = {
        "layer": 2, "pooling": "content", "presentation": "bare", "score": "centred",
        "split": "control", "before": figures,
        "after": {"separation": 0.3, "mrr": 0.4 + change, "reverse": {"mrr": 0.4 + change}},
        "tests": {"mrr": {"ci95": [change - 0.05, change + 0.05]}},
    }  # fmt: skip
    curve = {"before": {"separation": 0.2, "mrr": 0.4}, "after": {"separation": 0.3, "mrr": 0.5}}
    layers = [{"layer": k, **curve} for k in range(3)]
    head = row | {"score": "cosine", "after": row["after"] | {"mrr": 0.7, "reverse": {"mrr": 0.7}}}
    return {"rows": [row], "linear_head": [head], "layers": layers, "split": "control", "pairs": 40}


@pytest.fixture
def part() -> MakePart:
    def part(arm: str, seed: int, articles: list[Article], **changes: Any) -> Part:
        full = arm == "full"
        result = {
            "method": "full" if full else "lora", "objective": "sft",
            "layers": "all" if full else "0-1", "trainable_parameters": 1000 if full else 20,
            "loss": {"before": 3.0, "after": 2.0 + seed / 10}, "alignment": alignment(0.1),
            "tokens_per_s": 100.0, "peak_mib": 800.0 if full else 400.0,
            "wall_seconds": 60.0 + seed, "energy_joules": 50.0, "steps": 300,
            "generation": {"tokens_per_s": 10.0}, "device": "cuda", "warnings": [],
            "device_name": "GPU", "made_from": {"dtype": "bfloat16", "nf4": False},
            "seed": seed, "side_by_side": 1,
        } | changes  # fmt: skip
        steps = [{"step": i + 1, "loss": 3 - i / 300} for i in range(300)]
        steps[-1]["validation_loss"] = 2.0
        return Part(arm, seed, result, predictions_of(articles, RIGHT[arm], seed), steps)

    return part


@pytest.fixture
def report(part: MakePart) -> MakeReport:
    def report(articles: int = 200, seeds: int = 3, **changes: Any) -> dict[str, Any]:
        tested = articles_of(articles)
        settings = CompareConfig(seeds=tuple(range(seeds)))
        parts = [part(arm, seed, tested, **changes) for arm in ARMS for seed in range(seeds)]
        found = gather(settings, parts, None, tested, None, resamples=1000)
        found["data"] = {
            "model": "<tiny> & small", "base_model": "tiny", "texts": "news.jsonl",
            "pairs": "builtin:sw-en", "test": "test.jsonl", "hash": "0" * 64,
            "counts": {"train": 9, "test": articles}, "selected_on_test": True,
            "max_new_tokens": 64, "beams": 1, "seconds": None, "devices": ["CPU"],
        }  # fmt: skip
        found["versions"] = {"torch": "2"}
        return found

    return report
