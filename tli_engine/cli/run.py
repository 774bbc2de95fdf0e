"""``tli-engine run``: another code base's script, its models accelerated as they load."""

from pathlib import Path
from typing import Any

import click


@click.command("run", context_settings={"allow_interspersed_args": False})
@click.option("--profile", is_flag=True, help="Print at the end what ran and what did not have to.")
@click.argument("script", type=click.Path(path_type=Path))
@click.argument("arguments", metavar="[ARGS]...", nargs=-1, type=click.UNPROCESSED)
def command(**options: Any) -> int:
    """Run SCRIPT, unmodified, with transformers, PEFT and bitsandbytes accelerated.

    Models are accelerated as they load, and what was accelerated is printed on stderr. The script has its own
    arguments, output, traceback and exit status. docs/drop-in.md says what changes and what does not.
    """
    # torch and transformers are imported here so that --help answers at once
    from tli_engine.cli._run import run

    return run(**options)
