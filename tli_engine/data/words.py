"""Words as tokens, and packs of words: many short sequences laid end to end, no padding rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from tli_engine.config import WordsConfig
from tli_engine.errors import UserError

# words tokenised at once: what a tokenizer returns of a word takes many times its own memory
_AT_ONCE = 4096


@dataclass(frozen=True)
class Word:
    """Token ids of one presented word; ``content`` marks the word's own tokens."""

    input_ids: tuple[int, ...]
    content: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.input_ids)


class WordTokenizer:
    """Presents words to a model: bare, after a space, or in a template per language."""

    def __init__(self, tokenizer: Any, config: WordsConfig) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._prefix: tuple[int, ...] = ()
        if config.prefix not in ("auto", "none"):
            token = tokenizer.convert_tokens_to_ids(config.prefix)
            if config.prefix not in tokenizer.get_vocab():
                raise UserError(
                    f"words.prefix: {config.prefix!r} is not a token of this model; use auto (what "
                    f"its tokenizer adds), none, or a token such as {tokenizer.bos_token!r}"
                )
            self._prefix = (token,)

    def __call__(self, words: Sequence[str], language: str) -> list[Word]:
        """Tokenise ``words`` of one language.

        Raises:
            UserError: A language without a template, or a word that yields no token.
        """
        before, after = self._surroundings(language) if words else ("", "")
        result: list[Word] = []
        for start in range(0, len(words), _AT_ONCE):
            result += self._tokenize(words[start : start + _AT_ONCE], language, before, after)
        return result

    def _tokenize(
        self, words: Sequence[str], language: str, before: str, after: str
    ) -> Iterator[Word]:
        encoded = self._tokenizer(
            [f"{before}{word}{after}" for word in words],
            add_special_tokens=self._config.prefix == "auto",
            return_special_tokens_mask=True,
            return_offsets_mapping=self._config.presentation == "template",
        )
        for i, word in enumerate(words):
            content = [not special for special in encoded["special_tokens_mask"][i]]
            if self._config.presentation == "template":
                start, end = len(before), len(before) + len(word)
                spans = encoded["offset_mapping"][i]
                content = [
                    c and a < end and b > start for c, (a, b) in zip(content, spans, strict=True)
                ]
            if not any(content):
                raise UserError(f"{word!r} ({language}) has no token of its own; remove this pair")
            ids = (*self._prefix, *encoded["input_ids"][i])
            yield Word(ids, (*[False] * len(self._prefix), *content))

    def _surroundings(self, language: str) -> tuple[str, str]:
        if self._config.presentation != "template":
            return (" " if self._config.presentation == "leading-space" else ""), ""
        if language not in self._config.template:
            have = ", ".join(self._config.template)
            raise UserError(f"words.template: none for {language!r}; there are: {have}")
        before, _, after = self._config.template[language].partition("{word}")
        return before, after


class Laid(Protocol):
    """What blocks that attend within documents need to know of a pack; see :class:`Pack`."""

    @property
    def input_ids(self) -> Tensor:
        """Token ids, ``[T]``, int64."""

    @property
    def position_ids(self) -> Tensor:
        """Position of each token in its own document, ``[T]``, int64."""

    @property
    def offsets(self) -> Tensor:
        """First token of each document, then ``T``; ``[S + 1]``."""

    @property
    def longest(self) -> int:
        """Tokens of the longest document, or more."""


@dataclass(frozen=True)
class Pack:
    """Words laid end to end.

    Attributes:
        input_ids: Token ids, ``[T]``, int64.
        position_ids: Position of each token in its own word, ``[T]``, int64.
        content: Whether a token belongs to the word itself, ``[T]``, bool.
        offsets: First token of each word, then ``T``; ``[S + 1]``, int64.
        rows: Tokens of each word, the last one repeated up to the longest, ``[S, longest]``.
        slots: Place of each token in the flattened ``rows``, ``[T]``, int64.
    """

    input_ids: Tensor
    position_ids: Tensor
    content: Tensor
    offsets: Tensor
    rows: Tensor
    slots: Tensor

    @property
    def words(self) -> int:
        """Number of words."""
        return self.rows.shape[0]

    @property
    def longest(self) -> int:
        """Tokens of the longest word."""
        return self.rows.shape[1]

    def to(self, device: torch.device) -> "Pack":
        """Copy to a device, without waiting for it."""
        return Pack(*(sent(getattr(self, f.name), device) for f in fields(self)))


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy from the host to a device: to a GPU by way of pinned memory, so that nothing waits for it."""
    if device.type == "cuda" and not tensor.is_cuda:
        # from other memory a copy of over 64 KiB waits for what was launched before
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def pack(words: Sequence[Word]) -> Pack:
    """Lay words end to end; at least one word, none empty."""
    lengths = torch.tensor([len(w) for w in words])
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    longest = int(lengths.max())
    segment = torch.repeat_interleave(torch.arange(len(words)), lengths)
    position_ids = torch.arange(int(offsets[-1])) - offsets[segment]
    columns = torch.arange(longest).expand(len(words), longest)
    return Pack(
        input_ids=torch.tensor([t for w in words for t in w.input_ids]),
        position_ids=position_ids,
        content=torch.tensor([c for w in words for c in w.content]),
        offsets=offsets,
        rows=offsets[:-1, None] + columns.minimum(lengths[:, None] - 1),
        slots=segment * longest + position_ids,
    )


def packs_of(words: Sequence[Word], max_tokens: int) -> list[list[int]]:
    """Split words into packs of at most ``max_tokens``, words of like length together.

    Returns:
        Indices into ``words``, one list a pack.
    """
    order = sorted(range(len(words)), key=lambda i: len(words[i]))
    packs: list[list[int]] = []
    tokens = max_tokens
    for i in order:
        if tokens + len(words[i]) > max_tokens:
            packs.append([])
            tokens = 0
        packs[-1].append(i)
        tokens += len(words[i])
    return packs
