"""What several processes do together: the checks of ``on_ranks.py``, on two of them and on four."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

Ranks = Callable[..., list[dict[str, str]]]
PROGRAMS = [
    Path(__file__).with_name(f"{name}.py")
    for name in (
        "on_ranks",
        "gradients_on_ranks",
        "full_on_ranks",
        "graphs_on_ranks",
        "resume_on_ranks",
    )
]
# of checks, which share processes: these take most of the time to start
GROUPS = "words,gradients,align,ends,sft,nf4,shards,full,graphs,resume"


def names(groups: str) -> list[str]:
    trees = [ast.parse(program.read_text(encoding="utf-8")) for program in PROGRAMS]
    functions = [n.name for tree in trees for n in tree.body if isinstance(n, ast.FunctionDef)]
    chosen = tuple(f"check_{group}" for group in groups.split(","))
    return [name for name in functions if name.startswith(chosen)]


def passed(reports: list[dict[str, str]], groups: str) -> None:
    failures = [
        f"{name} on rank {rank}:\n{trace}"
        for rank, report in enumerate(reports)
        for name, trace in report.items()
        if trace
    ]
    assert not failures, "\n".join(failures)
    assert all(list(report) == names(groups) for report in reports)


def test_on_two(ranks: Ranks, model_folder: Path) -> None:
    passed(ranks(2, GROUPS, model_folder), GROUPS)


@pytest.mark.long
def test_on_four(ranks: Ranks, model_folder: Path) -> None:
    passed(ranks(4, GROUPS, model_folder), GROUPS)


@pytest.mark.long
def test_shards_of_four_are_read_by_two(ranks: Ranks, model_folder: Path) -> None:
    passed(ranks(4, "write", model_folder), "write")
    passed(ranks(2, "read", model_folder), "read")


def test_every_check_is_run() -> None:
    run = {name for groups in (GROUPS, "write", "read") for name in names(groups)}
    assert run == set(names(""))
