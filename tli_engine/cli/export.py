"""``tli-engine export``: a run's adapter, for use elsewhere."""

from pathlib import Path

import click

from tli_engine.errors import ConfigError


@click.command("export")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--format", "kind", type=click.Choice(["peft"]), default="peft", show_default=True)
@click.option("--strength", default=1.0, show_default=True, help="Scale what the adapter adds.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A new folder.")
def command(run: Path, kind: str, strength: float, out: Path) -> None:
    """Write the adapter of RUN, a run folder, as a PEFT adapter that needs no tli-engine."""
    if not 0 < strength < float("inf"):
        raise ConfigError(f"--strength {strength}: must be a positive number")
    from tli_engine.cli._export import export_peft

    export_peft(run, strength, out)
