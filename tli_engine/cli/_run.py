"""What ``tli-engine run`` does."""

from collections import Counter
from pathlib import Path

from tli_engine.cli.console import plain_table, say
from tli_engine.integrations.lazy_model import AT_ONCE
from tli_engine.integrations.script import ScriptRun, run_script
from tli_engine.integrations.training_graphs import LAUNCHED

# what is counted of a model, and what it is called
_COLUMNS = {
    "calls": "calls",
    "lazy": "lazy",
    "words": "words found again",
    "blocks": "blocks run",
    "of_blocks": "of",
    "replayed": "replayed",
}
# what is counted by a reason, and what it is called
_REASONS = {
    AT_ONCE: "calls computed at once",
    LAUNCHED: "blocks trained without graphs",
}


def run(script: Path, arguments: tuple[str, ...], profile: bool) -> int:
    """Run a script, and return its exit status."""
    status, ran, seconds = run_script(script, arguments, lambda line: say(f"tli-engine: {line}"))
    if not ran.models and status == 0:
        say(
            "tli-engine: no model was accelerated: none was loaded by from_pretrained or adapted by PEFT"
        )
    if profile:
        _print_profile(ran, seconds)
    return status


def _print_profile(ran: ScriptRun, seconds: float) -> None:
    from rich.console import Console

    table = plain_table(f"{seconds:.1f} s")
    table.add_column("model", min_width=max((len(name) for name, _ in ran.counts), default=0))
    for column in _COLUMNS.values():
        table.add_column(column, justify="right")
    for name, counts in ran.counts:
        table.add_row(name, *(f"{counts.get(key, 0):,}" for key in _COLUMNS))
    Console(stderr=True, highlight=False).print(table)
    for name, counts in ran.counts:
        if counts["lazy"]:
            say(f"tli-engine: {name}: {_host_seconds(counts)}")
        for key, count in counts.items():
            for prefix, what in _REASONS.items():
                if key.startswith(prefix):
                    reason = key.removeprefix(prefix)
                    say(f"tli-engine: {name}: {what}: {count:,} x: {reason}")


def _host_seconds(counts: Counter[str]) -> str:
    """Where the host's time in a model went; a GPU works on meanwhile."""
    names = ("call", "read", "first_read", "recording")
    called, read, first, recording = (counts[f"{name}_ns"] / 1e9 for name in names)
    return (
        f"host: {called:.2f} s in lazy calls; {read:.2f} s in reading hidden states, {first:.2f} s "
        f"of it the first time, {recording:.2f} s in {counts['recordings']:,} recordings of blocks"
    )
