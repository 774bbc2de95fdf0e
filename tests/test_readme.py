"""The README's figures are those of the committed results; links lead somewhere, commands can be given."""

import re
import shlex
from pathlib import Path

import click
import pytest

from bench.readme import FILLED, README, fill
from tli_engine.cli import group
from tli_engine.cli.train import read_values
from tli_engine.config import resolve_config
from tli_engine.evaluate.compare.config import split_config

DOCUMENTS = (README, *sorted((README.parent / "docs").rglob("*.md")))


@pytest.mark.parametrize("document", FILLED, ids=lambda path: path.name)
def test_tables_and_output_are_the_committed_ones(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert fill(text) == text


def test_links_resolve() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (Path(document).parent / target).exists(), f"{document}: {target}"


def commands(text: str) -> list[list[str]]:
    """What stands after ``tli-engine`` in blocks of a shell's lines; variables have a value."""
    text = text.replace("\\\n", " ")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    given = [
        re.sub(r"\$\w+", "some/thing", line) for line in lines if line.startswith("tli-engine ")
    ]
    return [shlex.split(line, comments=True)[1:] for line in given]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_can_be_given(document: Path) -> None:
    """Options are known, and so are the recipes and keys that they name."""
    for name, *arguments in commands(document.read_text(encoding="utf-8")):
        command = group.get_command(click.Context(group), name)
        assert command is not None, name
        found = command.make_context(name, list(arguments)).params
        if found.get("recipe"):
            kind = "compare" if name == "compare" else "run"
            values, where = read_values(None, found["recipe"], found["overrides"], kind)  # type: ignore[arg-type]
            (split_config if name == "compare" else resolve_config)(values, where)  # type: ignore[operator]


def test_every_published_figure_has_a_command() -> None:
    """The last cell of its row names the sections that it takes; each has its commands."""
    text = (README.parent / "docs" / "reproduce.md").read_text(encoding="utf-8")
    parts = re.split(r"^##+ (.+)\n", text, flags=re.MULTILINE)[1:]
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    given = {
        re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")): {n for n, *_ in commands(body)}
        for title, body in sections.items()
    }
    numbered = {anchor[0]: names for anchor, names in given.items() if anchor[0].isdigit()}
    assert numbered == {"1": {"scan"}, "2": {"scan"}, "3": {"train"}, "4": {"evaluate", "train"}}
    figures = []
    for line in re.findall(r"^\|.*\d.*\|$", sections["Figures and commands"], re.MULTILINE):
        *_, figure, how = (cell.strip() for cell in line.strip("|").split("|"))
        figures.append(figure)
        assert {*re.findall(r"\(#([^)]+)\)", how)} <= given.keys(), line
        named = re.findall(r"(?:^|; or | and )(\d)", re.sub(r"\[(\d)\]\([^)]+\)", r"\1", how))
        assert named, line
        assert {*named} <= numbered.keys(), line
    trained = ["0.3211", "0.3143", "0.4113", "0.4033"]
    assert figures == ["0.3153", "0.9808", "0.99998", "0.9876", *trained]
