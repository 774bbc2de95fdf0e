"""``tli-engine export``: what a run has trained, for use elsewhere."""

from pathlib import Path

import click

from tli_engine.errors import ConfigError


@click.command("export")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "kind",
    type=click.Choice(["peft", "merged", "nf4"]),
    default="peft",
    show_default=True,
    help="A PEFT adapter; a whole model; a whole model in bitsandbytes' NF4.",
)
@click.option("--strength", default=1.0, show_default=True, help="Scale what the adapter adds.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A new folder.")
def command(run: Path, kind: str, strength: float, out: Path) -> None:
    """Write what RUN, a run folder, has trained in a form that needs no tli-engine.

    A whole model is a folder that transformers loads. How far its logits lie from those of the base
    model with the adapter, over 16 sentences, is printed and kept in export.json.
    """
    if not 0 < strength < float("inf"):
        raise ConfigError(f"--strength {strength}: must be a positive number")
    from tli_engine.cli._export import export_model, export_peft

    if kind == "peft":
        export_peft(run, strength, out)
    else:
        export_model(run, kind, strength, out)
