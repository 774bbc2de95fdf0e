"""``tli-engine info``: what is installed, and which backend each op uses."""

import json

import click


@click.command("info")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """Print versions, devices, built-in models, and which backend each op uses and why."""
    # torch is imported here so that --help answers at once
    from tli_engine.cli._info import collect, print_info

    facts = collect()
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        print_info(facts)
