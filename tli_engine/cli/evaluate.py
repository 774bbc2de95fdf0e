"""``tli-engine evaluate``: what did a run do?"""

import math
from dataclasses import dataclass
from pathlib import Path

import click

from tli_engine.config import Pooling
from tli_engine.errors import ConfigError

# options that are about one of two kinds of runs; the others are about both
OF_PAIRS = ("--final-layer", "--no-final-layer", "--pooling")
OF_SUMMARIES = (
    *("--max-new-tokens", "--batch-size", "--beams", "--temperature", "--top-p", "--seed"),
    *("--language", "--against"),
)


@dataclass(frozen=True)
class Writing:
    """How summaries are written and scored, and the run that they are held against."""

    max_new_tokens: int
    batch_size: int
    beams: int
    temperature: float
    top_p: float
    seed: int
    language: str | None
    against: Path | None


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
@click.option(
    "--pooling",
    type=click.Choice(["paper", "content", "last", "weighted"]),
    help="Pool word pairs this way; by default as the run was trained.",
)
@click.option("--device", help="Device to run on; by default the run's own choice.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Tokens of a summary at the most.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Summaries written at the same time.",
)
@click.option(
    "--beams", type=click.IntRange(1), default=1, show_default=True, help="Beams; 1 is greedy."
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Draw tokens, 1 from the model's own distribution; 0 takes the likeliest.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Draw among the likeliest tokens that together have this probability.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Of what is drawn.",
)
@click.option(
    "--language",
    help="Of the summaries, for BLEU's and ROUGE's words; by default the run's data.language.",
)
@click.option(
    "--against",
    metavar="RUN",
    type=click.Path(path_type=Path),
    help="Another evaluated run: test its summaries against this one's.",
)
def command(
    run: Path,
    final_layer: bool,
    texts: tuple[Path, ...],
    strength: str,
    pooling: Pooling | None,
    device: str | None,
    max_new_tokens: int,
    batch_size: int,
    beams: int,
    temperature: float,
    top_p: float,
    seed: int,
    language: str | None,
    against: Path | None,
) -> None:
    """Measure what the training of RUN, a run folder, did.

    Of word pairs: prints cosines of translations beside those of random pairs, and retrieval, for
    the pairs trained on and for control pairs, at the training layer and at the final one; and the
    baseline to beat, the frozen model with a linear head.

    Of summaries: the loss on data.validation, and BLEU, chrF++ and ROUGE of what the model writes
    there, beside the base model's summaries, first sentences and another article's summary. They
    go to predictions.jsonl, those of the last strength if there are several.

    Writes evaluation.json and plots into the folder.
    """
    strengths, given = _strengths(strength), _given(click.get_current_context())
    if beams > 1 and temperature > 0:
        raise ConfigError("--beams and --temperature do not go together: beams draw nothing")
    for name, value in (("--temperature", temperature), ("--top-p", top_p)):
        # click takes it to be in any range
        if math.isnan(value):
            raise ConfigError(f"{name}: must be a number, got nan")
    for option in given:
        if option in ("--top-p", "--seed") and temperature == 0:
            why = "beams draw nothing" if beams > 1 else "nothing is drawn without --temperature"
            raise ConfigError(f"{option}: {why}")
    # torch and transformers are imported here so that --help answers at once
    from tli_engine.cli._evaluate import evaluate_run

    how = (max_new_tokens, batch_size, beams, temperature, top_p, seed)
    writing = Writing(*how, language, against)
    evaluate_run(run, final_layer, texts, strengths, device, writing, pooling, given)


def _strengths(text: str) -> list[float]:
    try:
        strengths = [float(s) for s in text.split(",")]
    except ValueError:
        strengths = []
    if not strengths or not all(map(math.isfinite, strengths)):
        raise ConfigError(f"--strength {text}: must be numbers such as 0.5,1.0")
    return strengths


def _given(context: click.Context) -> list[str]:
    """The options that the command line has, each by its first name."""
    found = []
    for parameter in context.command.params:
        name = str(parameter.name)
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            is_off = context.params[name] is False and parameter.secondary_opts
            found.append((parameter.secondary_opts if is_off else parameter.opts)[0])
    return found
