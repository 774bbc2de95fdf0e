"""A tokenizer that lost its merges is refused, one that joins its words is taken."""

import itertools
import string
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from tli_engine.errors import UserError
from tli_engine.models.tokenizer import load_tokenizer

# every pair of letters from the first half, and each followed by one of the other
_PAIRS = ["".join(p) for p in itertools.product(string.ascii_lowercase[:13], repeat=2)]
_WORDS = [pair + letter for pair, letter in zip(_PAIRS, itertools.cycle("nopqrst"), strict=False)]


def _folder(path: Path, merges: list[tuple[str, str]]) -> Path:
    pieces = ["<unk>", *string.ascii_lowercase, *_PAIRS, *_WORDS]
    model = BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model)).save_pretrained(path)
    return path


def test_words_that_are_joined(tmp_path: Path) -> None:
    merges = [*map(tuple, _PAIRS), *((w[:2], w[2]) for w in _WORDS)]
    tokenizer = load_tokenizer("mine", _folder(tmp_path, merges))  # type: ignore[arg-type]
    assert tokenizer(_WORDS[5]).input_ids == [1 + 26 + len(_PAIRS) + 5]


def test_merges_that_were_lost(tmp_path: Path) -> None:
    # some joins are left: what is read wrongly need not be letters alone
    folder = _folder(tmp_path, list(map(tuple, _PAIRS)))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^mine: its tokenizer splits words .*\(0 of 169 come out"):
        load_tokenizer("mine", folder)
