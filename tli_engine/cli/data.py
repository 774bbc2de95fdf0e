"""``tli-engine data``: look at word pairs before training on them."""

import json

import click


@click.group("data")
def command() -> None:
    """Look at word pairs before training on them."""


@command.command("check")
@click.argument("file")
@click.option("--control", help="File of control pairs; by default FILE's rows of split control.")
@click.option("--languages", default="swahili,english", show_default=True, help="The two columns.")
@click.option("--model", help="Also report lengths in this model's tokens.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(file: str, control: str | None, languages: str, model: str | None, as_json: bool) -> None:
    """Report duplicates, leaks between splits, class cues and lengths in FILE's word pairs."""
    from tli_engine.cli._data import run_check
    from tli_engine.data.pairs import parse_languages

    report = run_check(file, control, parse_languages(languages), model)
    if as_json:
        print(json.dumps(report.to_json(), indent=1, ensure_ascii=False))
        return
    from tli_engine.cli._data import print_report

    print_report(report)
