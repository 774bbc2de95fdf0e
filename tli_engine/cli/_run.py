"""What ``tli-engine run`` does."""

from pathlib import Path

from tli_engine.cli.console import plain_table, say
from tli_engine.integrations.script import ScriptRun, run_script


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
    table.add_column("model")
    for column in ("calls", "lazy", "words found again", "blocks run", "of"):
        table.add_column(column, justify="right")
    for name, counts in ran.counts:
        figures = (counts.get(n, 0) for n in ("calls", "lazy", "words", "blocks", "of_blocks"))
        table.add_row(name, *(f"{figure:,}" for figure in figures))
    Console(stderr=True, highlight=False).print(table)
