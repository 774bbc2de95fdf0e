"""Bits per byte of text files, before and after a training: measured, put together, printed."""

from collections.abc import Mapping
from typing import Any

from tli_engine.cli.console import progress
from tli_engine.evaluate.bits_per_byte import bits_per_byte
from tli_engine.models.causal import CausalModel


def bits_of(model: CausalModel, tokenizer: Any, texts: Mapping[str, list[str]]) -> dict[str, float]:
    """Bits per byte of each file, whose lines ``texts`` has, with progress."""
    found = {}
    for name, lines in texts.items():
        with progress(name, len(lines)) as advance:

            def told(lines: int, advance: Any = advance) -> None:
                advance(lines, "")

            found[name] = bits_per_byte(model.early, tokenizer, model.head, lines, told)
    return found


def costs_of(
    before: Mapping[str, float], after: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """Bits of each file for JSON; ``after`` has them by strength, the last of which counts."""
    costs: dict[str, Any] = {}
    for name, bits in before.items():
        by_strength = {strength: found[name] for strength, found in after.items()}
        last = list(by_strength.values())[-1]
        costs[name] = {"before": bits, "after": last, "after_by_strength": by_strength}
    return costs


def print_costs(costs: Mapping[str, Any]) -> None:
    """A line for each file and strength."""
    for file, cost in costs.items():
        for strength, after in cost["after_by_strength"].items():
            change = after / cost["before"] - 1
            print(
                f"{file}: {cost['before']:.4f} → {after:.4f} bits per byte "
                f"({change:+.1%}) at strength {strength}"
            )
