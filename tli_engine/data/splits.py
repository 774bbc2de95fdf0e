"""The pairs of a run, read, presented and tokenised, by split."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tli_engine.config import DataConfig, WordsConfig
from tli_engine.data.pairs import PairList, group_ids, read_splits
from tli_engine.data.words import Word, WordTokenizer
from tli_engine.errors import UserError


@dataclass(frozen=True)
class Split:
    """Tokenised pairs under a name, ``train`` or ``control``."""

    name: str
    pairs: PairList
    source: list[Word]
    target: list[Word]

    @property
    def words(self) -> list[Word]:
        """All sources, then all targets."""
        return [*self.source, *self.target]

    @property
    def groups(self) -> tuple[list[int], list[int]]:
        """Number of the distinct word on either side of each pair."""
        return group_ids(self.pairs.source), group_ids(self.pairs.target)


def read_run_pairs(data: DataConfig) -> dict[str, PairList]:
    """Read the ``train`` and, if there are any, the ``control`` pairs of a run.

    Raises:
        UserError: As :func:`tli_engine.data.pairs.read_pairs`, or fewer than two training pairs.
    """
    train, control = read_splits(data.pairs, data.control, data.languages)
    train = train[: data.limit]
    if len(train) < 2:
        raise UserError(f"{data.pairs}: a contrastive loss needs at least 2 pairs, there is 1")
    return {"train": train} if control is None else {"train": train, "control": control}


def tokenize_splits(pairs: dict[str, PairList], tokenizer: Any, words: WordsConfig) -> list[Split]:
    """Present and tokenise every split's words."""
    tokenize = WordTokenizer(tokenizer, words)
    return [
        Split(name, p, tokenize(p.source, p.languages[0]), tokenize(p.target, p.languages[1]))
        for name, p in pairs.items()
    ]


def tokens_of(splits: Sequence[Split]) -> set[int]:
    """Every token that the words of the splits need."""
    return {token for split in splits for word in split.words for token in word.input_ids}
