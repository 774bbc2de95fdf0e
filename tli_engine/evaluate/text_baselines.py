"""Summaries that take no model: without them a score means nothing."""

import re
from collections.abc import Sequence

import numpy as np

_CLOSERS = "[\"'”’»)\\]）】」』]*+"  # noqa: RUF001
# a stop that a space follows, or one of those that need none: Ethiopic (two old word-spaces
# too), Arabic script's, Devanagari's, Chinese and Japanese ones
_END = re.compile(
    # a run is looked at once: from its first one, all of it
    rf"(?<![.!?…])[.!?…]++{_CLOSERS}(?=\s|$)|(?:[።፧፨؟۔।॥。！？｡．]|፡፡)+[.!?…]*{_CLOSERS}|\n+",  # noqa: RUF001
)
# the next character on the line
_NEXT = re.compile(r"[^\S\n]*(.?)")
# initials, abbreviations such as k.m, and titles in Swahili, English, Arabic and Nepali
_SHORTENED = re.compile(
    r"(?<![^\s(\"'“‘])(?:[A-ZÀ-ÞА-Я]|(?:[^\W\d_]\.)+[^\W\d_]"  # noqa: RUF001
    r"|Bi|Bw|Dk|Dkt|Dr|Mh|Mhe|Mr|Mrs|Ms|Mt|Prof|Rev|Sgt|St|د|डा|डॉ|नं|रु)$"
)


def split_sentences(text: str) -> list[str]:
    """Sentences, by their full stops; a line break ends one too.

    Simple on purpose: initials, titles and a full stop before a small letter end no sentence;
    other abbreviations do.
    """
    sentences, start = [], 0
    ends = [match.end() for match in _END.finditer(text) if not _goes_on(text, match)]
    for end in [*ends, len(text)]:
        sentence = text[start:end].strip()
        if sentence:
            sentences.append(sentence)
        start = end
    return sentences


def _goes_on(text: str, stop: re.Match[str]) -> bool:
    if stop[0][0] not in ".…":
        return False
    before = text[max(0, stop.start() - 32) : stop.start()]
    if stop[0] == "." and _SHORTENED.search(before):
        return True
    after = _NEXT.match(text, stop.end())
    return after is not None and after[1].islower()


def lead(text: str, count: int) -> str:
    """The first sentences of an article, a line each; fewer where it has no more."""
    return "\n".join(split_sentences(text)[:count])


def random_summaries(summaries: Sequence[str], seed: int = 0) -> list[str]:
    """For each article the summary of another one, drawn at random; empty where there is no other."""
    count = len(summaries)
    if count < 2:
        return [""] * count
    others = np.random.default_rng(seed).integers(1, count, count)
    return [summaries[(i + int(other)) % count] for i, other in enumerate(others)]


def baseline_texts(
    articles: Sequence[str], summaries: Sequence[str], seed: int = 0
) -> dict[str, list[str]]:
    """Predictions of every baseline: ``lead-1``, ``lead-3`` and ``random-summary``."""
    return {
        "lead-1": [lead(text, 1) for text in articles],
        "lead-3": [lead(text, 3) for text in articles],
        "random-summary": random_summaries(summaries, seed),
    }
