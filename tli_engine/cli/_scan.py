"""The work of ``tli-engine scan``."""

import csv
import io
from pathlib import Path

from rich.table import Table

from tli_engine.align.scan import Scan, scan
from tli_engine.cli.console import plain_table, progress, say, show, warn
from tli_engine.config import Pooling, Presentation, Quantize, resolve_words
from tli_engine.data.pairs import parse_languages, read_pairs
from tli_engine.data.words import WordTokenizer
from tli_engine.errors import UserError
from tli_engine.evaluate.plots import plot_scan
from tli_engine.models.device import choose_device, choose_dtype
from tli_engine.models.early import load_early
from tli_engine.models.files import open_model
from tli_engine.train.run_folder import check_free, check_writable, write_json, write_text


def run_scan(
    model: str,
    pairs: str,
    languages: str,
    pooling: Pooling,
    presentation: Presentation,
    templates: tuple[str, ...],
    prefix: str,
    layers: int | None,
    limit: int | None,
    quantize: Quantize,
    device: str,
    dtype: str,
    out: Path | None,
    overwrite: bool,
) -> None:
    """Scan and report; options are those of the command."""
    words = resolve_words(presentation, templates, prefix)
    pair_list = read_pairs(pairs, parse_languages(languages))[:limit]
    if out is not None:
        check_writable(out) if overwrite else check_free(out, overwrite=False)
    if len(pair_list) < 2:
        given = pairs if limit is None else f"--limit {limit}"
        raise UserError(f"{given}: a scan needs at least 2 pairs")
    where = choose_device(device)
    held_in = choose_dtype(dtype, where)
    files = open_model(model)
    tokenize = WordTokenizer(files.tokenizer, words)
    source = tokenize(pair_list.source, pair_list.languages[0])
    target = tokenize(pair_list.target, pair_list.languages[1])
    depth = files.config.num_hidden_layers if layers is None else layers
    early = load_early(
        files,
        depth,
        dtype=held_in,
        device=where,
        quantize=quantize,
        token_ids={token for word in source + target for token in word.input_ids},
    )
    early.fuse_on_gpu()
    say(f"{model}: {depth} blocks, {len(pair_list)} pairs, on {where}")
    with progress("scan", len(set(source + target)) * (depth + 1)) as advance:
        result = scan(
            early, model, pair_list, source, target, pooling, lambda n: advance(n, ""), say
        )
    _report(result, out)


def _report(result: Scan, out: Path | None) -> None:
    show(_table(result))
    for warning in result.warnings:
        warn(warning)
    if result.proposal.layer is not None:
        print(f"proposed layer: {result.proposal.layer} ({result.proposal.reason})")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "scan.json", result.to_json())
        write_text(out / "scan.csv", _csv(result))
        plot_scan(result, out / "scan.png")
        print(f"written: {out}/scan.json, scan.csv, scan.png")


def _table(result: Scan) -> Table:
    title = f"{result.model}, {result.pairs} pairs, {result.pooling} pooling"
    table = plain_table(title)
    for column in ("layer", "true", "random", "separation", "P@1", "MRR", "CSLS P@1", "← P@1"):
        table.add_column(column, justify="right")
    for k, a in enumerate(result.layers):
        table.add_row(
            f"{'* ' if k == result.proposal.layer else ''}{k}",
            f"{a.cosine_true:.5f}",
            f"{a.cosine_random:.5f}",
            f"{a.separation:.5f}",
            f"{a.forward.p_at_1:.2%}",
            f"{a.forward.mrr:.4f}",
            f"{a.forward.csls_p_at_1:.2%}",
            f"{a.reverse.p_at_1:.2%}",
        )
    return table


def _csv(result: Scan) -> str:
    rows = []
    for k, a in enumerate(result.layers):
        row = {"layer": k, **a.to_json()}
        reverse = row.pop("reverse")
        rows.append({**row, **{f"reverse_{key}": value for key, value in reverse.items()}})
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
