"""Another run's summaries, held against those of the run that ``tli-engine evaluate`` measures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tli_engine.data.texts import Texts
from tli_engine.errors import UserError
from tli_engine.evaluate.records import read_evaluation
from tli_engine.evaluate.summaries import METRICS, PREDICTIONS, read_predictions
from tli_engine.evaluate.text_metrics import TextScores, score_texts
from tli_engine.evaluate.text_tests import text_tests


@dataclass(frozen=True)
class Rival:
    """An evaluated run.

    Attributes:
        folder: Its folder.
        summaries: Of the same articles, in their order.
        decoding: How they were written.
    """

    folder: Path
    summaries: Sequence[str]
    decoding: Mapping[str, Any]


def read_rival(folder: Path, texts: Texts) -> Rival:
    """The summaries that an evaluated run wrote of these articles.

    Raises:
        UserError: It was not evaluated, its files do not say on what, or it was on other articles.
    """
    record = read_evaluation(folder).get("predictions")
    summaries = read_predictions(folder / PREDICTIONS, (record or {}).get("sha256"))
    if record is None:
        raise UserError(
            f"--against {folder}: does not say of which articles its summaries are; "
            f"run tli-engine evaluate {folder} again"
        )
    own, other = texts.identity(), record["articles"]
    if other["sha256"] != own["sha256"]:
        raise UserError(
            f"--against {folder}: its summaries are of other articles, {other['count']} of "
            f"{other['name']}; this run's are {own['count']} of {own['name']}"
        )
    return Rival(folder, summaries, record["decoding"])


def hold_against(
    rival: Rival,
    scores: TextScores,
    references: Sequence[str],
    language: str | None,
    decoding: Mapping[str, Any],
) -> dict[str, Any]:
    """Test this run's scores against another's, print that, and return it for JSON."""
    tests: dict[str, Any] = text_tests(scores, score_texts(rival.summaries, references, language))
    for metric, test in tests.items():
        low, high = test["ci95"]
        print(
            f"  {METRICS[metric]} against {rival.folder}: {test['difference']:+.2f}, 95 % interval "
            f"[{low:+.2f}, {high:+.2f}], p = {test['p_holm']:.3g} (Holm)"
        )
    names = dict.fromkeys((*decoding, *rival.decoding))
    pairs = {name: [decoding.get(name), rival.decoding.get(name)] for name in names}
    differing = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if differing:
        own, theirs = (
            ", ".join(f"{name} {pair[i]}" for name, pair in differing.items()) for i in (0, 1)
        )
        print(
            f"  the two were not written alike: this run's with {own}, {rival.folder}'s with "
            f"{theirs}; what is tested is the difference of both, run and decoding"
        )
    return {"run": str(rival.folder), "tests": tests, "decoding_differs": differing}
