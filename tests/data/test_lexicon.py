"""The rules that the shipped lexicon keeps; a failure names the rows."""

import re
import unicodedata
from collections import defaultdict
from typing import Any

import pytest

from tli_engine.data.check import check
from tli_engine.data.pairs import normalise, read_rows, read_splits

SIDES = ("swahili", "english")
PARTS_OF_SPEECH = {
    "noun",
    "verb",
    "adjective",
    "adverb",
    "numeral",
    "pronoun",
    "preposition",
    "conjunction",
    "interjection",
}
# letters that two words of one stem have in common
STEM = 4


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [row for _, row in read_rows("builtin:sw-en")[1]]


def split(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["split"] == name]


def test_size(rows: list[dict[str, Any]]) -> None:
    assert len(rows) >= 800
    assert len(split(rows, "control")) >= 120


def test_columns_and_their_values(rows: list[dict[str, Any]]) -> None:
    assert all(list(row) == [*SIDES, "part_of_speech", "split"] for row in rows)
    assert [r for r in rows if r["part_of_speech"] not in PARTS_OF_SPEECH] == []
    assert [r for r in rows if r["split"] not in ("train", "control")] == []


@pytest.mark.parametrize("language", SIDES)
def test_a_word_occurs_once_over_all_splits(language: str, rows: list[dict[str, Any]]) -> None:
    found = defaultdict(list)
    for row in rows:
        found[normalise(row[language])].append(row)
    assert [same for same in found.values() if len(same) > 1] == []


@pytest.mark.parametrize("language", SIDES)
def test_words_are_written_in_the_one_clean_form(language: str, rows: list[dict[str, Any]]) -> None:
    form = re.compile(r"[^\W\d_](?:[^\W\d_]|[ '-](?=[^\W\d_]))*")
    words = [row[language] for row in rows]
    assert [w for w in words if unicodedata.normalize("NFC", w) != w] == []
    # letters with single spaces, apostrophes or hyphens within: no gloss, list or punctuation
    assert [w for w in words if not form.fullmatch(w)] == []


def test_the_two_sides_differ(rows: list[dict[str, Any]]) -> None:
    assert [r for r in rows if normalise(r["swahili"]) == normalise(r["english"])] == []


def test_no_class_markers(rows: list[dict[str, Any]]) -> None:
    """A cue such as ku-soma / to read would be learnt in place of the meaning."""
    english = re.compile(r"-|(?:to|a|an|the) ", re.IGNORECASE)
    assert [r for r in rows if english.match(r["english"]) or r["swahili"].startswith("-")] == []

    verbs = {r["swahili"] for r in rows if r["part_of_speech"] == "verb"}
    stems = {r["swahili"] for r in rows}
    infinitives = {v for v in verbs if v.startswith("ku") and v[2:].strip(" -") in stems}
    assert infinitives == set()
    # ku- begins some stems, kutana or kumbuka; on a list of infinitives it begins all
    assert sum(v.startswith(("ku", "kw")) for v in verbs) < 0.05 * len(verbs)


def test_no_control_pair_is_a_relative_of_a_training_pair(rows: list[dict[str, Any]]) -> None:
    """Not unseen: mwalimu / teacher, where ualimu / teaching was trained on."""
    training = split(rows, "train")
    relatives: dict[str, dict[str, set[int]]] = {side: defaultdict(set) for side in SIDES}
    for number, row in enumerate(training):
        for side in SIDES:
            for stem in stems_of(row[side]):
                relatives[side][stem].add(number)
    leaks = []
    for row in split(rows, "control"):
        near = [
            set().union(*(relatives[side].get(s, set()) for s in stems_of(row[side])))
            for side in SIDES
        ]
        leaks += [(row, training[number]) for number in sorted(near[0] & near[1])]
    assert leaks == []


def stems_of(word: str) -> set[str]:
    """Every run of ``STEM`` letters: Swahili inflects in front, English behind."""
    return {
        part[i : i + STEM]
        for part in re.split(r"[ '-]", normalise(word))
        for i in range(len(part) - STEM + 1)
    }


def test_stems_of() -> None:
    assert stems_of("Mwalimu") & stems_of("ualimu") == {"alim", "limu"}
    assert stems_of("teacher") & stems_of("teaching") == {"teac", "each"}
    assert stems_of("maji") == {"maji"}
    assert stems_of("jua") == stems_of("ng'oa") == set()


def test_data_check_finds_nothing(rows: list[dict[str, Any]]) -> None:
    train, control = read_splits("builtin:sw-en", None, SIDES)
    assert control is not None
    assert (len(train), len(control)) == (len(split(rows, "train")), len(split(rows, "control")))
    report = check(train, control)
    assert report.warnings == []
    assert report.duplicate_pairs == 0
    assert report.identical_sides == []
    assert report.leaks == {"swahili": [], "english": []}


def test_control_has_the_mix_of_the_whole(rows: list[dict[str, Any]]) -> None:
    """Measured on nouns alone, control pairs would not speak for the rest."""
    for part_of_speech in ("noun", "verb", "adjective"):
        shares = [
            sum(r["part_of_speech"] == part_of_speech for r in part) / len(part)
            for part in (split(rows, "train"), split(rows, "control"))
        ]
        assert abs(shares[0] - shares[1]) < 0.1, part_of_speech
