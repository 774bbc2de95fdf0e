"""The tokenizer of a model's folder or GGUF file, and whether it joins the words that it knows."""

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from tli_engine.errors import UserError

# files that are here, and no code that lies beside them
LOCAL_FILES: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
# entries of the vocabulary that are looked at; fewer words than the second tell nothing
_LOOKED_AT, _ENOUGH = 2048, 64
# where a word may come out whole: by itself, after a space, within a word (digits are joined to no letter)
_PLACES = ("{}", " {}", "1{}1")
# of those words, how many must come out whole; of a tokenizer that was read rightly nearly all do
_WHOLE = 0.5


def load_tokenizer(name: str, folder: Path, gguf_file: str | None = None) -> Any:
    """The tokenizer in a model's folder, or in its GGUF file.

    Raises:
        UserError: There is none that can be loaded, or it splits the words of its own vocabulary.
    """
    if gguf_file:
        return _gguf_tokenizer(name, folder, gguf_file, file_identity(folder / gguf_file))
    return _tokenizer(name, folder)


@lru_cache(maxsize=2)
def _gguf_tokenizer(name: str, folder: Path, file: str, identity: tuple[int, ...]) -> Any:
    return _tokenizer(name, folder, gguf_file=file)


def _tokenizer(name: str, folder: Path, **options: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL_FILES, **options)
    except Exception as e:
        # of a file that it cannot read, tokenizers raises no narrower one
        raise UserError(
            f"{name}: its tokenizer cannot be loaded; are tokenizer.json and "
            f"tokenizer_config.json there? ({first_line(e)})"
        ) from None
    _check_joins(name, tokenizer, from_gguf=bool(options))
    return tokenizer


def _check_joins(name: str, tokenizer: Any, *, from_gguf: bool) -> None:
    """Raise ``UserError`` if words of the vocabulary do not come out as the tokens that they are.

    A tokenizer whose merges were lost in a conversion still gives tokens for any text, of a letter
    or two, and a model then trains on what it never saw: nothing else would tell.
    """
    total = len(tokenizer)
    ids = range(0, total, max(1, total // _LOOKED_AT))
    texts = {i: tokenizer.decode([i]).strip() for i in ids}
    # three letters and more can only come of joining
    words = {i: text for i, text in texts.items() if len(text) >= 3 and text.isalpha()}
    if len(words) < _ENOUGH:
        return
    whole = _whole(tokenizer, words)
    if whole >= _WHOLE * len(words):
        return
    from transformers import __version__

    mend = (
        f"transformers {__version__} does not read this GGUF file's tokenizer rightly: "
        "pip install -U transformers, or name a folder of the model in its place"
        if from_gguf
        else "tokenizer.json lacks merges, or tokenizer_config.json names another kind of tokenizer: "
        "make both anew from their source"
    )
    raise UserError(
        f"{name}: its tokenizer splits words of its own vocabulary "
        f"({whole} of {len(words)} come out whole); {mend}"
    )


def _whole(tokenizer: Any, words: Mapping[int, str]) -> int:
    """How many words come out as the token that they are in one of the places.

    A part of a word does not by itself, where a space is put before the first word or the last
    letters of one are marked.
    """
    placed = ([place.format(word) for word in words.values()] for place in _PLACES)
    found = [_tokens(tokenizer, texts) for texts in placed]
    return sum(any(i in tokens for tokens in of) for i, *of in zip(words, *found, strict=True))


def _tokens(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The tokens of each text; none where one of them has a letter that the tokenizer has no token for."""
    try:
        tokens: list[list[int]] = tokenizer(texts, add_special_tokens=False).input_ids
    except Exception:
        # without an unknown token tokenizers refuses a space or a digit, by no narrower error
        return [[] for _ in texts]
    return tokens


def file_identity(path: Path) -> tuple[int, ...]:
    """What tells a file from another, and from itself after a change; nothing of one that is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its type's name."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
