"""The rules that the shipped Swahili texts keep; a failure names the rows."""

import json
import re
from collections import Counter
from importlib.resources import files
from typing import Any

import pytest

from tli_engine.config import DataConfig
from tli_engine.data.texts import SplitName, read_texts
from tli_engine.errors import UserError

FILE = files("tli_engine") / "data" / "summaries" / "sw-demo.jsonl"
TEST, VALIDATION = 30, 20


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?]) ", text)


def words(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text.lower())


def test_size(rows: list[dict[str, Any]]) -> None:
    assert len(rows) >= 150


def test_columns(rows: list[dict[str, Any]]) -> None:
    assert [r for r in rows if list(r) != ["id", "split", "text", "summary"]] == []
    assert [r["id"] for r in rows] == [f"sw-demo-{n:03}" for n in range(1, len(rows) + 1)]


def test_the_last_rows_are_unseen(rows: list[dict[str, Any]]) -> None:
    training = len(rows) - TEST - VALIDATION
    expected = ["train"] * training + ["test"] * TEST + ["validation"] * VALIDATION
    assert [r["split"] for r in rows] == expected


def test_each_split_is_read_by_name(rows: list[dict[str, Any]]) -> None:
    data = DataConfig(texts="builtin:sw-demo")
    splits: tuple[SplitName, ...] = ("train", "validation", "test")
    for split in splits:
        texts = read_texts(data, split)
        assert texts is not None
        read = [texts[i].text for i in range(len(texts))]
        assert read == [row["text"] for row in rows if row["split"] == split]
    with pytest.raises(UserError, match="there is builtin:sw-demo"):
        read_texts(DataConfig(texts="builtin:sw"), "train")


@pytest.mark.parametrize("column", ["text", "summary"])
def test_none_is_there_twice(column: str, rows: list[dict[str, Any]]) -> None:
    counts = Counter(" ".join(words(row[column])) for row in rows)
    assert [text for text, count in counts.items() if count > 1] == []


def test_lengths(rows: list[dict[str, Any]]) -> None:
    assert [r for r in rows if not 30 <= len(r["text"].split()) <= 70] == []
    assert [r for r in rows if not 2 <= len(sentences(r["text"])) <= 4] == []
    assert [r for r in rows if not 4 <= len(r["summary"].split()) <= 10] == []


def test_texts_are_clean(rows: list[dict[str, Any]]) -> None:
    # plain letters, figures and punctuation with single spaces; Swahili needs no others
    form = re.compile(r"[A-Za-z0-9][A-Za-z0-9',.?! -]*")
    cells = [row[column] for row in rows for column in ("text", "summary")]
    assert [c for c in cells if not form.fullmatch(c) or "  " in c or c != c.strip()] == []
    assert [r for r in rows if not r["text"].endswith(".")] == []
    assert [r for r in rows if r["summary"][-1] in ".,?!"] == []


def test_a_headline_is_no_sentence_of_its_text(rows: list[dict[str, Any]]) -> None:
    copied = [
        row for row in rows if words(row["summary"]) in [words(s) for s in sentences(row["text"])]
    ]
    assert copied == []


def test_a_headline_is_no_start_of_its_text(rows: list[dict[str, Any]]) -> None:
    """Otherwise copying would score as well as summing up."""
    starts = [row for row in rows if words(row["summary"])[:3] == words(row["text"])[:3]]
    assert starts == []


def test_the_engine_reads_them(rows: list[dict[str, Any]]) -> None:
    texts = read_texts(DataConfig(texts=str(FILE)), "train")
    assert texts is not None
    read = [(texts[i].text, texts[i].summary) for i in range(len(texts))]
    assert read == [(row["text"], row["summary"]) for row in rows]
