"""``tli-engine evaluate``: what did a run do?"""

from pathlib import Path

import click


@click.command("evaluate")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--device", help="Device to run on; by default the run's own choice.")
def command(run: Path, device: str | None) -> None:
    """Measure the alignment of RUN, a run folder, before and after its training.

    Prints cosines of translations beside those of random pairs, and retrieval, for the pairs
    trained on and for control pairs; writes evaluation.json and histograms into the folder.
    """
    # torch and transformers are imported here so that --help answers at once
    from tli_engine.cli._evaluate import evaluate_run

    evaluate_run(run, device)
