"""``tli-engine scan``: at which layer do two languages meet?"""

from pathlib import Path
from typing import Any

import click


@click.command("scan")
@click.argument("model")
@click.option("--pairs", default="builtin:sw-en", show_default=True, help="File of word pairs.")
@click.option(
    "--languages", default="swahili,english", show_default=True, help="The two columns of it."
)
@click.option(
    "--pooling",
    type=click.Choice(["content", "paper", "last", "weighted"]),
    default="content",
    show_default=True,
    help="How a word's tokens become one vector; paper includes special tokens such as BOS.",
)
@click.option(
    "--presentation",
    type=click.Choice(["bare", "leading-space", "template"]),
    default="bare",
    show_default=True,
    help="How a word is shown to the model.",
)
@click.option(
    "--template",
    "templates",
    multiple=True,
    metavar="LANGUAGE=TEXT",
    help="Template around {word}, for --presentation template; once per language.",
)
@click.option(
    "--prefix", default="auto", show_default=True, help="First token: auto, none, or a token."
)
@click.option(
    "--layers", type=click.IntRange(min=0), help="Look no further than hidden_states[LAYERS]."
)
@click.option("--limit", type=click.IntRange(min=1), help="Use the first LIMIT pairs.")
@click.option(
    "--quantize",
    type=click.Choice(["auto", "none", "nf4"]),
    default="auto",
    show_default=True,
    help="Hold the blocks in NF4; auto keeps what the checkpoint has.",
)
@click.option("--device", default="auto", show_default=True)
@click.option("--dtype", default="auto", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for scan.json, .csv, .png.")
@click.option("--overwrite", is_flag=True, help="Replace files in --out.")
def command(**options: Any) -> None:
    """Measure the alignment of two languages at every layer of MODEL.

    MODEL is a Hub id, a Hugging Face folder, a GGUF file or builtin:smollm2-135m. For every layer, counted
    as in hidden_states (0 is the embeddings), prints the cosine of translations, of random pairs,
    and how often a word's translation is its nearest neighbour. Proposes a layer by retrieval,
    if one stands out from chance.
    """
    # torch and transformers are imported here so that --help answers at once
    from tli_engine.cli._scan import run_scan

    run_scan(**options)
