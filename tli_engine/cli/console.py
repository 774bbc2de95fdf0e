"""What the commands print: progress, tables, warnings."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tli_engine.align.bootstrap import too_few_pairs
from tli_engine.align.retrieval import Alignment, chance_mrr
from tli_engine.evaluate.alignment import Row
from tli_engine.evaluate.statistics import bootstrap_ci95

# seconds between two lines of progress where nobody watches a bar
_LINE_EVERY = 10.0
# columns beyond which a table is wrapped in a file or a pipe
_WIDEST = 240


def say(line: str) -> None:
    """Print a line of progress on stderr; of several processes of a run, the first does."""
    if speaks():
        print(line, file=sys.stderr, flush=True)


def speaks() -> bool:
    """Whether this process is the first of its run, or the only one."""
    return os.environ.get("TLI_ENGINE_RANK", "0") == "0"


def warn(line: str) -> None:
    """Print a warning on stderr."""
    say(f"warning: {line}")


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """Show progress: a bar on a terminal, else a line now and then.

    Yields:
        ``advance(amount, note)``.
    """
    if sys.stderr.isatty() and speaks():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total, note="")

            def move(amount: int, note: str = "") -> None:
                bar.update(task, advance=amount, note=note)

            yield move
        return
    done, last = 0, time.monotonic()

    def advance(amount: int, note: str = "") -> None:
        nonlocal done, last
        done += amount
        if time.monotonic() - last >= _LINE_EVERY:
            last = time.monotonic()
            say(f"{title} {done}/{total} {note}".rstrip())

    yield advance


def show(table: Table, stderr: bool = False) -> None:
    """Print a table on stdout or stderr, as wide as it needs where that is not a terminal."""
    console = Console(highlight=False, stderr=stderr)
    if not (sys.stderr if stderr else sys.stdout).isatty():
        unbounded = console.options.update(width=_WIDEST)
        width = console.measure(table, options=unbounded).maximum
        console = Console(highlight=False, stderr=stderr, width=width)
    console.print(table)


def alignment_table(rows: list[Row], title: str) -> Table:
    """Before and after, split by split: cosine of true and of random pairs, and retrieval."""
    table = plain_table(title)
    for column in ("pairs", "score"):
        table.add_column(column)
    for column in ("true", "random", "separation", "P@1", "MRR", "CSLS P@1"):
        table.add_column(column, justify="right")
    for row in rows:
        b, a = row.before, row.after
        table.add_row(
            f"{row.split} ({len(b.true)})",
            row.score if row.strength == 1 else f"{row.score}, strength {row.strength:g}",
            _change(b.cosine_true, a.cosine_true),
            _change(b.cosine_random, a.cosine_random),
            _change(b.separation, a.separation),
            f"{_two_way(b, 'p_at_1'):.1%} → {_two_way(a, 'p_at_1'):.1%}",
            _change(_two_way(b, "mrr"), _two_way(a, "mrr")),
            f"{_two_way(b, 'csls_p_at_1'):.1%} → {_two_way(a, 'csls_p_at_1'):.1%}",
        )
    return table


def control_line(row: Row) -> str:
    """What the change on unseen pairs is worth: its interval, beside chance."""
    before, after = (a.two_way_reciprocal_ranks.numpy() for a in (row.before, row.after))
    low, high = bootstrap_ci95(after - before)
    sides = (row.after.forward.candidates, row.after.reverse.candidates)
    chance = sum(map(chance_mrr, sides)) / 2
    told = "a change" if low > 0 or high < 0 else "no change that can be told from none"
    # of few pairs the interval is too narrow, of one it is a point
    verdict = too_few_pairs(len(before), "a change") or told
    return (
        f"  {row.split} {row.score}: MRR {before.mean():.3f} → {after.mean():.3f}, "
        f"95 % interval of the change [{low:+.3f}, {high:+.3f}]: {verdict}; chance {chance:.3f}"
    )


def plain_table(title: str | None = None) -> Table:
    """A table with a line under its head and no other."""
    return Table(title=title, title_justify="left", header_style="", box=box.SIMPLE_HEAD)


def _change(before: float, after: float) -> str:
    # z: no minus sign before a rounded zero
    return f"{before:z.3f} → {after:z.3f}"


def _two_way(alignment: Alignment, figure: str) -> float:
    return float(getattr(alignment.forward, figure) + getattr(alignment.reverse, figure)) / 2
