"""``tli-engine evaluate``: what did a run do?"""

import math
from pathlib import Path

import click

from tli_engine.errors import ConfigError


@click.command("evaluate")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--final-layer/--no-final-layer",
    default=True,
    help="Also measure at hidden_states[-1], which takes the whole model.  [default: do]",
)
@click.option(
    "--text",
    "texts",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Text file, a document a line: bits per byte before and after; may be repeated.",
)
@click.option(
    "--strength", default="1.0", show_default=True, help="Scale the adapter: 0.5, or 0.5,1.0."
)
@click.option("--device", help="Device to run on; by default the run's own choice.")
def command(
    run: Path, final_layer: bool, texts: tuple[Path, ...], strength: str, device: str | None
) -> None:
    """Measure the alignment of RUN, a run folder, before and after its training.

    Prints cosines of translations beside those of random pairs, and retrieval, for the pairs
    trained on and for control pairs, at the training layer and at the final one; and the baseline
    to beat, the frozen model with a linear head. Writes evaluation.json and plots into the folder.
    """
    try:
        strengths = [float(s) for s in strength.split(",")]
    except ValueError:
        strengths = []
    if not strengths or not all(map(math.isfinite, strengths)):
        raise ConfigError(f"--strength {strength}: must be numbers such as 0.5,1.0")
    # torch and transformers are imported here so that --help answers at once
    from tli_engine.cli._evaluate import evaluate_run

    evaluate_run(run, final_layer, texts, strengths, device)
