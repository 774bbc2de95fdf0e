"""ROUGE for any script: XL-Sum's tokenisation, no stemmer, F1.

The words are those of XL-Sum's scorer (https://github.com/csebuetnlp/xl-sum) for a language it has
no segmenter for: lower case; punctuation splits words and is dropped; letters keep their accents and
vowel signs; digits part from letters; other symbols and ideographs stand alone. The scores, ties
within longest common subsequences included, are those of the rouge-score package for such words.
Lsum is of the same words; XL-Sum's scorer neither parts digits nor ideographs there.
"""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Literal

# the CJK ideographs: unified, compatibility and their extensions
_IDEOGRAPHS = (
    *((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF)),
    *((0x20000, 0x2A6DF), (0x2A700, 0x2CEAF), (0x2F800, 0x2FA1F)),
)

_Kind = Literal["letter", "digit", "mark", "ideograph", "symbol", "space", "nothing"]
Lines = list[list[str]]


def split_words(text: str, characters: bool = False) -> list[str]:
    """Words of a text.

    Args:
        text: In any script.
        characters: Letters beyond ASCII stand alone, each with its marks: for scripts that put no
            spaces between words.
    """
    words: list[str] = []
    before: _Kind = "space"
    for character in text.lower():
        kind = _kind(character)
        if kind == "nothing":
            continue
        if kind == "mark":
            # belongs to what it is written on; none is written on an ideograph
            joins = before not in ("space", "ideograph")
            kind = before if joins else "letter" if before == "ideograph" else "symbol"
        else:
            joins = kind == before and kind in ("letter", "digit")
            if characters and kind == "letter":
                joins = joins and character.isascii() and words[-1].isascii()
        if joins:
            words[-1] += character
        elif kind != "space":
            words.append(character)
        before = kind
    return words


@lru_cache(maxsize=1 << 14)
def _kind(character: str) -> _Kind:
    code, category = ord(character), unicodedata.category(character)
    if character in "\t\n\r" or category[0] in "ZP":
        return "space"
    if category[0] == "C" or character == "\ufffd":
        return "nothing"
    if any(first <= code <= last for first, last in _IDEOGRAPHS):
        return "ideograph"
    if category[0] in "LMN":
        kinds: dict[str, _Kind] = {"L": "letter", "M": "mark", "N": "digit"}
        return kinds[category[0]]
    # $, +, <, ^ and the like, which Unicode calls symbols
    return "space" if code < 0x80 else "symbol"


def split_lines(text: str, characters: bool = False) -> Lines:
    """Words of a text, line by line: ROUGE-Lsum takes a line for a sentence."""
    return [split_words(line, characters) for line in text.split("\n")]


def rouge(prediction: Lines, reference: Lines) -> tuple[float, float, float, float]:
    """F1 of ROUGE-1, ROUGE-2, ROUGE-L and ROUGE-Lsum, from 0 to 1; 0 where either has no words."""
    predicted, expected = list(chain(*prediction)), list(chain(*reference))
    sizes = (len(predicted), len(expected))
    return (
        _ngram_f1(predicted, expected, 1),
        _ngram_f1(predicted, expected, 2),
        _f1(_lcs_length(expected, predicted), *sizes),
        _f1(_summary_hits(prediction, reference), *sizes),
    )


def _f1(hits: int, predicted: int, expected: int) -> float:
    return 2 * hits / (predicted + expected) if hits else 0.0


def _ngram_f1(predicted: Sequence[str], expected: Sequence[str], n: int) -> float:
    counts = [Counter(zip(*(w[i:] for i in range(n)), strict=False)) for w in (predicted, expected)]
    hits = (counts[0] & counts[1]).total()
    return _f1(hits, counts[0].total(), counts[1].total())


def _lcs_rows(reference: Sequence[str], prediction: Sequence[str]) -> list[int]:
    """The table of longest common subsequences, a bit a reference word (Hyyrö 2004).

    Row j is of the first j predicted words. The length for the first i reference words is the
    number of zeros among the row's low i bits.
    """
    places: dict[str, int] = {}
    for i, word in enumerate(reference):
        places[word] = places.get(word, 0) | 1 << i
    row = whole = (1 << len(reference)) - 1
    rows = [row]
    for word in prediction:
        hits = row & places.get(word, 0)
        row = ((row + hits) | (row - hits)) & whole
        rows.append(row)
    return rows


def _zeros(row: int, bits: int) -> int:
    return bits - (row & (1 << bits) - 1).bit_count()


def _lcs_length(reference: Sequence[str], prediction: Sequence[str]) -> int:
    return _zeros(_lcs_rows(reference, prediction)[-1], len(reference))


def _lcs_places(reference: Sequence[str], prediction: Sequence[str]) -> set[int]:
    """Places in the reference of one longest common subsequence; of several, rouge-score's."""
    rows = _lcs_rows(reference, prediction)
    places = set()
    i, j = len(reference), len(prediction)
    while i and j:
        if reference[i - 1] == prediction[j - 1]:
            i, j = i - 1, j - 1
            places.add(i)
        elif _zeros(rows[j - 1], i) > _zeros(rows[j], i - 1):
            j -= 1
        else:
            i -= 1
    return places


def _summary_hits(prediction: Lines, reference: Lines) -> int:
    """Words that a line of the reference shares, in order, with some line of the prediction.

    No word counts more often than it is on either side.
    """
    left = Counter(chain(*prediction)) & Counter(chain(*reference))
    hits = 0
    for line in reference:
        shared: set[int] = set()
        for other in prediction:
            shared |= _lcs_places(line, other)
        for i in shared:
            if left[line[i]]:
                left[line[i]] -= 1
                hits += 1
    return hits
