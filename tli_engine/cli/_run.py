"""What ``tli-engine run`` does."""

from collections import Counter
from pathlib import Path

from tli_engine.cli.console import plain_table, say, show
from tli_engine.integrations.lazy_model import AT_ONCE
from tli_engine.integrations.memo import NOT_REMEMBERED
from tli_engine.integrations.script import ScriptRun, run_script
from tli_engine.integrations.training_graphs import LAUNCHED

# what is counted of a model, and what it is called: short, for counts of five digits in 80 columns
_COLUMNS = {
    "calls": "calls",
    "lazy": "lazy",
    "words": "words\nfound",
    "blocks": "blocks\nrun",
    "of_blocks": "\nof",
    "replayed": "\nreplayed",
}
# what is counted by a reason, and what it is called
_REASONS = {
    AT_ONCE: "calls computed at once",
    NOT_REMEMBERED: "calls on a word not remembered",
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
    models = _called_models(ran)
    say(f"tli-engine: the script took {seconds:.1f} s, loading included")
    if models:
        table = plain_table()
        table.add_column("\nmodel", no_wrap=True)
        for column in _COLUMNS.values():
            # a narrow terminal breaks a number, and loses none of it
            table.add_column(column, justify="right", overflow="fold")
        for name, counts in models:
            table.add_row(name, *(f"{counts[key]:,}" for key in _COLUMNS))
        show(table, stderr=True)
    elif ran.counts:
        say("tli-engine: no accelerated model was called")
    for name, counts in models:
        if counts["lazy"]:
            say(f"tli-engine: {name}: {_host_seconds(counts)}")
        for key, count in counts.items():
            for prefix, what in _REASONS.items():
                if key.startswith(prefix):
                    reason = key.removeprefix(prefix)
                    say(f"tli-engine: {name}: {what}: {count:,} x: {reason}")


def _called_models(ran: ScriptRun) -> list[tuple[str, Counter[str]]]:
    """Models that were called, and their counts; of one class they have numbers, in the order of loading."""
    of_class = Counter(name for name, _ in ran.counts)
    seen: Counter[str] = Counter()
    called = []
    for name, counts in ran.counts:
        seen[name] += 1
        if any(counts.values()):
            called.append((f"{name} {seen[name]}" if of_class[name] > 1 else name, counts))
    return called


def _host_seconds(counts: Counter[str]) -> str:
    """Where the host's time in a model went; a GPU works on meanwhile."""
    names = ("call", "read", "first_read", "recording")
    called, read, first, recording = (counts[f"{name}_ns"] / 1e9 for name in names)
    return (
        f"host: {called:.2f} s in lazy calls; {read:.2f} s in reading hidden states, {first:.2f} s "
        f"of it the first time, {recording:.2f} s in {counts['recordings']:,} recordings of blocks"
    )
