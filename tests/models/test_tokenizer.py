"""A tokenizer that lost its merges is refused, one that joins its words is taken."""

import itertools
import json
import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece
from transformers import AutoTokenizer, PreTrainedTokenizerFast

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


_BPE = {"vocab_size": 1200, "show_progress": False}
_ALPHABET = pre_tokenizers.ByteLevel.alphabet()
_WORDS_OF_QWEN = Regex(
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _text() -> list[str]:
    """Sentences of long words whose parts come again and again, more often within words than first."""
    draw = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    stems = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(500)]
    words = ["".join(draw.choices(stems, k=draw.randint(1, 4))) for _ in range(1500)]
    return [" ".join(draw.choices(words, k=12)).capitalize() for _ in range(300)]


def _byte_level(*, space: bool = False, split: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=not split)]
    if split:
        tokenizer.normalizer = normalizers.NFC()
        steps.insert(0, pre_tokenizers.Split(_WORDS_OF_QWEN, "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(**_BPE, initial_alphabet=_ALPHABET)
    tokenizer.train_from_iterator(_text(), trainer)
    return tokenizer


def _sentencepiece(*, prefix: bool, drops_space: bool) -> Tokenizer:
    """As Llama 2 and Mistral (with a prefix), and Gemma: trained by words, run without cutting."""
    tokenizer = Tokenizer(BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    if prefix:
        steps.insert(0, normalizers.Prepend("▁"))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if drops_space:
        back.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(back)
    special = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(**_BPE, special_tokens=special)
    tokenizer.train_from_iterator(_text(), trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
    return tokenizer


def _unigram(*, collapse: bool, scheme: str) -> Tokenizer:
    tokenizer = Tokenizer(Unigram())
    steps: list[normalizers.Normalizer] = [normalizers.NFKC(), normalizers.Lowercase()]
    if collapse:
        steps += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=800, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(_text(), trainer)
    return tokenizer


def _wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(**_BPE, special_tokens=["[UNK]"])
    tokenizer.train_from_iterator(_text(), trainer)
    return tokenizer


def _word_level() -> Tokenizer:
    tokenizer = Tokenizer(WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(**_BPE, special_tokens=["<unk>"])
    tokenizer.train_from_iterator(_text(), trainer)
    return tokenizer


def _suffixed() -> Tokenizer:
    """A BPE that marks the ends of words, as CLIP's."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(**_BPE, special_tokens=["<unk>"], end_of_word_suffix="</w>")
    tokenizer.train_from_iterator(_text(), trainer)
    return tokenizer


_RIGHT = {
    "byte-level": _byte_level,
    "byte-level-space-first": lambda: _byte_level(space=True),
    "byte-level-qwen": lambda: _byte_level(split=True),
    "sentencepiece-llama2": lambda: _sentencepiece(prefix=True, drops_space=True),
    "sentencepiece-space-dropped-alone": lambda: _sentencepiece(prefix=False, drops_space=True),
    "sentencepiece-gemma": lambda: _sentencepiece(prefix=False, drops_space=False),
    "unigram": lambda: _unigram(collapse=False, scheme="always"),
    "unigram-spaces-collapsed": lambda: _unigram(collapse=True, scheme="always"),
    "unigram-no-space-first": lambda: _unigram(collapse=False, scheme="never"),
    "wordpiece": _wordpiece,
    "words": _word_level,
    "suffixed": _suffixed,
}


@pytest.mark.parametrize("make", _RIGHT.values(), ids=_RIGHT.keys())
def test_a_tokenizer_that_is_right_is_taken(make: Callable[[], Tokenizer], tmp_path: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=make()).save_pretrained(tmp_path)
    tokenizer = load_tokenizer("mine", tmp_path)
    parts = [tokenizer.decode([i]).strip() for i in range(len(tokenizer))]
    # enough words for the check to look at
    assert sum(len(part) >= 3 and part.isalpha() for part in parts) >= 64


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece-llama2", "sentencepiece-gemma"])
def test_a_trained_tokenizer_without_its_merges(kind: str, tmp_path: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=_RIGHT[kind]()).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    stored = json.loads(path.read_text("utf-8"))
    stored["model"]["merges"] = []
    path.write_text(json.dumps(stored), "utf-8")
    with pytest.raises(
        UserError, match=r"\(0 of \d+ come out whole\); tokenizer.json lacks merges"
    ):
        load_tokenizer("mine", tmp_path)


def test_a_gguf_file_that_is_read_without_merges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = AutoTokenizer.from_pretrained(_folder(tmp_path, []))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: broken)
    monkeypatch.setattr("transformers.__version__", "5.17.0")
    with pytest.raises(UserError) as error:
        load_tokenizer("mine.gguf", tmp_path, "mine.gguf")
    assert str(error.value).endswith(
        "(0 of 169 come out whole); transformers 5.17.0 does not read this GGUF file's tokenizer rightly: "
        "pip install -U transformers, or name a folder of the model in its place"
    )


def _changed(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The folder of a tokenizer of words, its model changed."""
    PreTrainedTokenizerFast(tokenizer_object=_word_level()).save_pretrained(path)
    file = path / "tokenizer.json"
    stored = json.loads(file.read_text("utf-8"))
    change(stored["model"])
    file.write_text(json.dumps(stored | {"added_tokens": []}), "utf-8")
    return path


def test_a_tokenizer_without_an_unknown_token_is_taken(tmp_path: Path) -> None:
    """It fails at a digit, which words need not have."""
    folder = _changed(tmp_path, lambda model: model["vocab"].pop("<unk>"))
    assert len(load_tokenizer("mine", folder)) > 64


def test_a_tokenizer_of_an_unknown_kind_is_one_line(tmp_path: Path) -> None:
    folder = _changed(tmp_path, lambda model: model.update(type="Nothing"))
    with pytest.raises(
        UserError, match=r"^mine: its tokenizer cannot be loaded; .* \(data did not"
    ):
        load_tokenizer("mine", folder)


def test_few_words_tell_nothing(tmp_path: Path) -> None:
    pieces = {letter: i for i, letter in enumerate(["<unk>", *string.ascii_lowercase, "neno"])}
    tokenizer = Tokenizer(BPE(pieces, [], unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    assert len(load_tokenizer("mine", tmp_path)) == len(pieces)
