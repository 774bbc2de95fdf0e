"""``tli-engine compare``: early-layer LoRA, TLI and full fine-tuning on the same data."""

from pathlib import Path

import click

from tli_engine.cli.train import read_values
from tli_engine.errors import ConfigError
from tli_engine.evaluate.compare.config import split_config


@click.command("compare")
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option("--recipe", help="A shipped configuration, in place of CONFIG: compare-demo.")
@click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    help="Override a key, e.g. compare.seeds=[0,1,2]; may be repeated.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder of the comparison; one that is there is gone on with.",
)
@click.option(
    "--only",
    metavar="ARM:SEED",
    multiple=True,
    help="Make the figures of this run alone, or of 'base', the base model, or try the learning rate "
    "ARM@RATE of compare.rates; may be repeated.",
)
@click.option(
    "--gather", is_flag=True, help="Run nothing: report on the runs that have their figures."
)
@click.option(
    "--jobs",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Runs at a time, each in a process of its own; the report says whose times are shared ones.",
)
@click.option("--side-by-side", type=click.IntRange(1), default=1, hidden=True)
def command(
    config: Path | None,
    recipe: str | None,
    overrides: tuple[str, ...],
    out: Path,
    only: tuple[str, ...],
    gather: bool,
    jobs: int,
    side_by_side: int,
) -> int:
    """Train each arm with each seed as CONFIG or a recipe says, test them alike, and report.

    The section compare of CONFIG has arms and seeds. Each is a run folder in --out; those that have
    their figures are not run again, and one that was interrupted goes on. With --only, runs can be
    made one at a time and on several machines; copy their folders and one compare.yaml together, and --gather. With
    compare.rates each arm's learning rate is chosen first, by the loss on data.validation. Small
    models leave most of a GPU idle: --jobs runs several side by side. Memory is each run's own then,
    times are not, and come from the runs that had the device to themselves if there are any. Writes
    report.html, report.json and a card, with figures alone: no article and no summary.
    """
    if only and gather:
        raise ConfigError("--only and --gather do not go together")
    shared, settings = split_config(*read_values(config, recipe, overrides, "compare"))
    # torch and transformers are imported here so that --help and bad keys answer at once
    from tli_engine.cli._compare import run_comparison

    return run_comparison(
        shared, settings, out, only, gather_only=gather, jobs=jobs, side_by_side=side_by_side
    )
