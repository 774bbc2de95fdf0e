"""ROUGE against XL-Sum's own scorer, whose figures are in summaries.json, and against rouge-score."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from rouge_score.rouge_scorer import RougeScorer

from tli_engine.evaluate.rouge import rouge, split_lines, split_words

NAMES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
# words and scores of XL-Sum's scorer, commit afcd803 with pyonmttok 1.38.1, no language given
SUMMARIES: dict[str, list[dict[str, Any]]] = json.loads(
    Path(__file__).with_name("summaries.json").read_text(encoding="utf-8")
)


class OurWords:
    def tokenize(self, text: str) -> list[str]:
        return split_words(text)


def ours(prediction: str, reference: str) -> dict[str, float]:
    return dict(zip(NAMES, rouge(split_lines(prediction), split_lines(reference)), strict=True))


def theirs(prediction: str, reference: str, words: OurWords | None = None) -> dict[str, float]:
    scores = RougeScorer(list(NAMES), tokenizer=words).score(reference, prediction)
    return {name: scores[name].fmeasure for name in NAMES}


@pytest.mark.parametrize("language", SUMMARIES)
def test_words_and_scores_are_xlsums(language: str) -> None:
    for pair in SUMMARIES[language]:
        assert split_words(pair["prediction"]) == pair["words"]
        found = ours(pair["prediction"], pair["reference"])
        assert [100 * found[name] for name in NAMES[:3]] == pytest.approx(pair["xlsum"])
        # on one line there is nothing to sum over, but words out of order are not found twice
        assert found["rougeLsum"] == pytest.approx(found["rougeL"])


@pytest.mark.parametrize("seed", range(60))
def test_plain_english_letters_score_as_with_rouge_score(seed: int) -> None:
    generator = random.Random(seed)
    words = ["a", "Ya", "mvua", "kubwa", "it's", "12", "3,500", "x-ray.", "U.N.", "(leo)", "--"]

    def text() -> str:
        gaps = generator.choices([" ", "\n", ", ", " \n\n"], [8, 1, 1, 1], k=20)
        return "".join(generator.choice(words) + gap for gap in gaps[: generator.randrange(20)])

    prediction, reference = text(), text()
    assert ours(prediction, reference) == pytest.approx(theirs(prediction, reference))


def test_lines_of_many_scripts_score_as_with_rouge_score() -> None:
    pairs = [pair for pairs in SUMMARIES.values() for pair in pairs]
    for p, q in itertools.pairwise(pairs):
        prediction = f"{p['prediction']}\n{q['reference']}"
        reference = f"{q['prediction']}\n\n{p['reference']}"
        assert ours(prediction, reference) == pytest.approx(
            theirs(prediction, reference, OurWords())
        )


def test_where_rouge_score_loses_letters() -> None:
    """It drops accents, other scripts and currency, and keeps digits with letters."""
    assert split_words("Café 2,500kg £3m") == ["café", "2", "500", "kg", "£", "3", "m"]
    assert ours("አዲስ ቀን", "አዲስ ቀን")["rouge1"] == 1
    assert theirs("አዲስ ቀን", "አዲስ ቀን")["rouge1"] == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Ng'ombe NG’OMBE", ["ng", "ombe", "ng", "ombe"]),  # noqa: RUF001
        ("a_b^c$d+e", ["a", "b", "c", "d", "e"]),
        ("٣كتب १२किलो ፫ሰዎች", ["٣", "كتب", "१२", "किलो", "፫", "ሰዎች"]),
        ("مكتبةً", ["مكتبةً"]),
        ("cafe\u0301 café", ["cafe\u0301", "café"]),
        ("क\u200dष\u00adक", ["कषक"]),
        ("新图书abc馆12", ["新", "图", "书", "abc", "馆", "12"]),
        ("x² ½ €5 😀😀", ["x", "²", "½", "€", "5", "😀", "😀"]),
        ("字\ufe00 \u0301 ok", ["字", "\ufe00", "\u0301", "ok"]),
        ("a\u2028b\u00a0c\td\x00e\ufffd", ["a", "b", "c", "de"]),
        (" \n.,!", []),
        ("", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert split_words(text) == words


def test_characters_of_scripts_without_spaces() -> None:
    """Marks stay with their letter; letters of ASCII and digits stay together."""
    assert split_words("น้ำท่วม BBC 2026", characters=True) == [
        *("น้", "ำ", "ท่", "ว", "ม", "bbc", "2026")
    ]
    assert split_words("テレビbbc局x", characters=True) == ["テ", "レ", "ビ", "bbc", "局", "x"]


@pytest.mark.parametrize(
    ("prediction", "reference"), [("", "neno"), ("neno", ""), ("", ""), ("?", "!")]
)
def test_without_words_scores_are_zero(prediction: str, reference: str) -> None:
    assert set(ours(prediction, reference).values()) == {0.0}


def test_single_words_have_no_pairs_of_words() -> None:
    assert ours("Neno", "neno.") == {"rouge1": 1, "rouge2": 0, "rougeL": 1, "rougeLsum": 1}
