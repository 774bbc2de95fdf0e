"""What is wrong with a list of word pairs before it is trained on: ``tli-engine data check``."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

from tli_engine.data.pairs import PairList, normalise
from tli_engine.data.words import WordTokenizer


@dataclass(frozen=True)
class SideReport:
    """One language of a list of pairs."""

    words: int
    distinct: int
    repeated: dict[str, int]
    multi_word: int
    common_prefixes: dict[str, int]
    tokens: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckReport:
    """Findings on training pairs, and on control pairs if there are any."""

    train: dict[str, SideReport]
    control: dict[str, SideReport]
    duplicate_pairs: int
    identical_sides: list[str]
    leaks: dict[str, list[str]]
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """Plain lists, numbers and strings."""
        return asdict(self)


# a spelled-out class marker on both sides, such as ku-soma / to read, is a cue a loss can exploit
_STEM_MARKERS = ("ku", "kw", "-")
_WORD_MARKERS = ("to ", "a ", "an ", "the ")


def _side(words: tuple[str, ...], language: str, tokenizer: WordTokenizer | None) -> SideReport:
    counts = Counter(normalise(w) for w in words)
    lengths = sorted(len(w) for w in tokenizer(words, language)) if tokenizer else []
    tokens: dict[str, float] = {}
    if lengths:
        mean = sum(lengths) / len(lengths)
        tokens = {"mean": round(mean, 2), "median": lengths[len(lengths) // 2], "max": lengths[-1]}
    return SideReport(
        words=len(words),
        distinct=len(counts),
        repeated={w: n for w, n in counts.most_common() if n > 1},
        multi_word=sum(" " in w for w in words),
        common_prefixes={
            m: n
            for m in (*_STEM_MARKERS, *_WORD_MARKERS)
            if (n := sum(w.casefold().startswith(m) for w in words))
        },
        tokens=tokens,
    )


def _cue(pairs: PairList) -> list[str]:
    """Markers that stand on both sides of the same pairs far more often than alone."""
    sides = [[w.casefold() for w in words] for words in (pairs.source, pairs.target)]
    found = []
    # either language may come first
    for markers in product(_STEM_MARKERS, _WORD_MARKERS), product(_WORD_MARKERS, _STEM_MARKERS):
        for marks in markers:
            rows = [[w.startswith(m) for w in side] for side, m in zip(sides, marks, strict=True)]
            both = sum(a and b for a, b in zip(*rows, strict=True))
            if both >= 3 and both > 0.5 * min(map(sum, rows)):
                found.append(
                    f"{both} pairs begin with {marks[0]!r} and {marks[1]!r}: the loss can learn "
                    f"this cue in place of the meaning; use bare forms"
                )
    return found


def leaks(train: PairList, control: PairList | None) -> dict[str, list[str]]:
    """Control words that are in training too, by language; none of them is unseen."""
    if control is None:
        return {}
    sides = zip(
        train.languages, (train.source, train.target), (control.source, control.target), strict=True
    )
    return {
        language: sorted({normalise(w) for w in seen} & {normalise(w) for w in unseen})
        for language, seen, unseen in sides
    }


def check(
    train: PairList, control: PairList | None, tokenizer: WordTokenizer | None = None
) -> CheckReport:
    """Look for duplicates, leaks between the splits, identical sides, class cues, lengths."""
    pairs = Counter(
        (normalise(s), normalise(t)) for s, t in zip(train.source, train.target, strict=True)
    )
    reports = {
        name: {
            language: _side(words, language, tokenizer)
            for language, words in zip(p.languages, (p.source, p.target), strict=True)
        }
        for name, p in (("train", train), ("control", control))
        if p is not None
    }
    leaked = leaks(train, control)
    warnings = _cue(train)
    for language, side in reports["train"].items():
        if side.repeated:
            warnings.append(
                f"{len(side.repeated)} {language} words repeat in training: true translations meet "
                f"as negatives unless align.mask_duplicates is on"
            )
    for language, words in leaked.items():
        if words:
            warnings.append(f"{len(words)} {language} control words are in training: not unseen")
    return CheckReport(
        train=reports["train"],
        control=reports.get("control", {}),
        duplicate_pairs=sum(n - 1 for n in pairs.values()),
        identical_sides=sorted(s for s, t in pairs if s == t),
        leaks=leaked,
        warnings=warnings,
    )
