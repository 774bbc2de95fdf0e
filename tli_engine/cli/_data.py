"""The work of ``tli-engine data check``."""

from tli_engine.cli.console import plain_table, show, warn
from tli_engine.config import WordsConfig
from tli_engine.data.check import CheckReport, check
from tli_engine.data.pairs import read_splits
from tli_engine.data.words import WordTokenizer


def run_check(
    file: str, control: str | None, languages: tuple[str, str], model: str | None
) -> CheckReport:
    """Read the pairs and check them; with a model, also count tokens."""
    train, unseen = read_splits(file, control, languages)
    tokenizer = None
    if model is not None:
        from tli_engine.models.files import open_model

        tokenizer = WordTokenizer(open_model(model).tokenizer, WordsConfig())
    return check(train, unseen, tokenizer)


def print_report(report: CheckReport) -> None:
    """Print the findings for a person."""
    table = plain_table()
    for column in ("split", "language"):
        table.add_column(column)
    for column in ("words", "distinct", "of several words", "tokens mean / max"):
        table.add_column(column, justify="right")
    for split, sides in (("train", report.train), ("control", report.control)):
        for language, side in sides.items():
            tokens = f"{side.tokens['mean']} / {side.tokens['max']}" if side.tokens else "-"
            table.add_row(
                split, language, str(side.words), str(side.distinct), str(side.multi_word), tokens
            )
    show(table)
    print(f"duplicate pairs: {report.duplicate_pairs}")
    print(f"pairs with identical sides: {len(report.identical_sides)}")
    for language, words in report.leaks.items():
        shown = f": {', '.join(words[:10])}" if words else ""
        print(f"{language} control words seen in training: {len(words)}{shown}")
    if not report.control:
        warn("no control pairs: mark some rows with split control, or give --control")
    for warning in report.warnings:
        warn(warning)
