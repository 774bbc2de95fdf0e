"""Goals of fine-tuning and generation are judged by the rows that they are about."""

import json
from pathlib import Path
from typing import Any

from bench.training_goals import fine_tuning_table, full_tuning_table, generation_table


def row(case: str, provider: str, rate: float, gib: float = 1.0, **more: Any) -> dict[str, Any]:
    notes = {"tokens_per_s": rate}
    found = {"case": case, "provider": provider, "peak_mib": 1024 * gib, "notes": notes}
    return found | {"model": "llama-3-8b", "roofline": 0.9} | more


def test_peers_count_within_the_memory_of_the_goal(tmp_path: Path) -> None:
    rows = [
        row("lora_early", "peft:save", 170, 30),
        row("lora_early", "peft", 100, 9),
        row("lora_early", "tli-engine", 200, 31, roofline=0.84),
        row("lora_early", "tli-engine:12-gib", 125, 11),
        # its weights are others
        row("lora_early", "tli-engine:bf16", 220, 12),
        row("lora_all", "peft", 100, 40),
        row("lora_all", "tli-engine", 120, 41),
        row("lora_all", "tli-engine:9-gib", 60, 9),
        row("lora_all", "unsloth", 50, 9.5),
    ]
    (tmp_path / "train_step.json").write_text(json.dumps({"rows": rows}))
    reached = [line.split(" | ")[2:4] for line in fine_tuning_table(tmp_path).splitlines()[2:]]
    assert [cells[0] for cells in reached] == ["**1.25**", "0.84", "1.20", "**1.20**"]
    assert [cells[1].partition(",")[0] for cells in reached] == [
        "tli-engine:12-gib", "tli-engine", "tli-engine", "tli-engine:9-gib",
    ]  # fmt: skip
    (tmp_path / "train_step.json").write_text(json.dumps({"rows": rows[:-1]}))
    assert "Unsloth within its memory | not measured" in fine_tuning_table(tmp_path)


def test_generation_is_judged_for_each_number_of_texts(tmp_path: Path) -> None:
    rows = [
        row("decode", provider, rate, shape={"batch": texts})
        for provider, texts, rate in (
            ("tli-engine", 16, 100),
            ("tli-engine", 1, 20),
            ("transformers+bitsandbytes", 16, 10),
            ("transformers+bitsandbytes", 1, 4),
            ("transformers:static", 16, 50),
        )
    ]
    (tmp_path / "generation.json").write_text(json.dumps({"rows": rows}))
    reached = [line.split(" | ")[-1] for line in generation_table(tmp_path).splitlines()[2:]]
    assert reached == ["**10.00** |", "5.00 |", "**2.00** |", "not measured |"]


def test_full_fine_tuning_is_judged_beside_adapters_and_peers(tmp_path: Path) -> None:
    small = {"model": "qwen2-1.5b"}
    rows = [
        row("lora_early", "tli-engine", 99, 30),
        row("lora_early", "tli-engine:bf16", 100, 40),
        row("lora_early", "tli-engine", 150, 10, **small),
        row("lora_early", "tli-engine:recompute", 100, 2, **small),
        row("full", "tli-engine", 100, 30, **small),
        row("full", "transformers", 70, 10, **small),
        row("full", "transformers+liger:save", 80, 20, **small),
    ]
    (tmp_path / "train_step.json").write_text(json.dumps({"rows": rows}))
    reached = [line.split(" | ")[-1] for line in full_tuning_table(tmp_path).splitlines()[2:]]
    assert reached == [
        "**0.99** |", "0.75 |", "**1.50** |", "0.33 |", "not measured |", "not measured |", "**1.25** |",
    ]  # fmt: skip
