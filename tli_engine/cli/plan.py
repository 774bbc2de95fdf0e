"""``tli-engine plan``: what a run will take, before anything is downloaded."""

from pathlib import Path

import click

from tli_engine.cli.train import resolve_run


@click.command("plan")
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option("--recipe", help="A shipped configuration, in place of CONFIG: demo, paper, …")
@click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    help="Override a key, e.g. train.batch_size=4; may be repeated.",
)
@click.option(
    "--device",
    help="Plan for h100, h200, a100, 4090, cpu, …; the device that a run would take here by default.",
)
@click.option(
    "--memory",
    type=click.FloatRange(min=0, min_open=True),
    help="GiB of the GPU's memory that the run may take; all by default.",
)
@click.option(
    "--gpus", type=click.IntRange(min=1), default=1, help="GPUs that share the run; 1 by default."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    config: Path | None,
    recipe: str | None,
    overrides: tuple[str, ...],
    device: str | None,
    memory: float | None,
    gpus: int,
    as_json: bool,
) -> None:
    """Say what training as CONFIG or a recipe says would take: downloads, disk, memory, time.

    No GPU and no weights are needed; of a model on the Hub, configuration and tokenizer are fetched.
    """
    resolved, _ = resolve_run(config, recipe, overrides)
    # torch and transformers are imported here so that --help answers at once
    from tli_engine.cli._plan import run_plan

    run_plan(resolved, device, memory, as_json, gpus)
