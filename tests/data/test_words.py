import random
import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tli_engine.config import WordsConfig
from tli_engine.data.words import Word, WordTokenizer, pack, packs_of
from tli_engine.errors import UserError

BOS, EOS, MA, SPACE_M = 0, 1, 258, 259


def template_of(**templates: str) -> WordsConfig:
    return WordsConfig(presentation="template", template=templates)


@pytest.fixture(scope="session")
def bytes_bpe() -> PreTrainedTokenizerFast:
    """A token for each byte, and for "ma" and " m"; adds a BOS and an EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {t: i for i, t in enumerate(["<s>", "</s>", *alphabet, "ma", "Ġm"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "m"), ("m", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def few_letters() -> PreTrainedTokenizerFast:
    """A token for each of a, i, j, m and the space, none for any other letter."""
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(" aijm")}, merges=[]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def own_text(tokenizer: PreTrainedTokenizerFast, word: Word) -> str:
    """Text of the tokens that are marked as the word's own."""
    ids = [i for i, own in zip(word.input_ids, word.content, strict=True) if own]
    return str(tokenizer.decode(ids))


def test_bare(bytes_bpe: Any) -> None:
    tokenize = WordTokenizer(bytes_bpe, WordsConfig())
    maji, water = tokenize(["maji", "water"], "swahili")
    assert maji.input_ids[:2] == (BOS, MA)
    assert maji.input_ids[-1] == EOS
    # what the tokenizer adds is not the word's own
    assert maji.content == (False, True, True, True, False)
    assert len(maji) == 5
    assert own_text(bytes_bpe, maji) == "maji"
    assert own_text(bytes_bpe, water) == "water"
    assert tokenize([], "swahili") == []


def test_leading_space(bytes_bpe: Any) -> None:
    (maji,) = WordTokenizer(bytes_bpe, WordsConfig(presentation="leading-space"))(["maji"], "sw")
    assert maji.input_ids[1] == SPACE_M
    assert own_text(bytes_bpe, maji) == " maji"


def test_words_of_unlike_length_are_not_padded(bytes_bpe: Any) -> None:
    words = ["a", "ng'ombe", "日本語", "é"]
    result = WordTokenizer(bytes_bpe, WordsConfig())(words, "any")
    assert [own_text(bytes_bpe, w) for w in result] == words
    assert [len(w) for w in result] == [2 + len(w.encode()) for w in words]


@pytest.mark.parametrize(
    "template",
    [
        pytest.param("Neno {word} hapa", id="within"),
        pytest.param("{word} ni neno", id="begins-with-it"),
        pytest.param("Neno: {word}", id="ends-with-it"),
        pytest.param("{word}", id="alone"),
        pytest.param("maji ({word}) maji", id="says-the-word-itself"),
        pytest.param("éé日本 «{word}», maji", id="many-bytes-a-letter"),
    ],
)
def test_template_marks_only_the_words_own_tokens(template: str, bytes_bpe: Any) -> None:
    tokenize = WordTokenizer(bytes_bpe, template_of(swahili=template))
    words = ["maji", "ng'ombe", "é日", "x", "nyumba kubwa"]
    for text, word in zip(words, tokenize(words, "swahili"), strict=True):
        shown = template.replace("{word}", text)
        assert bytes_bpe.decode(word.input_ids) == f"<s>{shown}</s>"
        # a token that begins with the space before the word is still the word's
        assert own_text(bytes_bpe, word).removeprefix(" ") == text
        first = word.content.index(True)
        assert all(word.content[first : first + sum(word.content)])
        before = template.partition("{word}")[0]
        assert bytes_bpe.decode(word.input_ids[:first]) == f"<s>{before}".removesuffix(
            " " if own_text(bytes_bpe, word).startswith(" ") else ""
        )


def test_each_language_has_its_template(bytes_bpe: Any) -> None:
    tokenize = WordTokenizer(bytes_bpe, template_of(swahili="neno {word}", english="word {word}"))
    for language, text in (("swahili", "<s>neno x</s>"), ("english", "<s>word x</s>")):
        assert bytes_bpe.decode(tokenize(["x"], language)[0].input_ids) == text
    with pytest.raises(UserError, match=r"words\.template: none for 'luo'; .*: swahili, english$"):
        tokenize(["x"], "luo")


@pytest.mark.parametrize("presentation", ["bare", "template"])
@pytest.mark.parametrize(
    ("prefix", "expected"),
    [("auto", (BOS, MA)), ("none", (MA,)), ("<s>", (BOS, MA)), ("</s>", (EOS, MA))],
)
def test_prefix(prefix: str, expected: tuple[int, ...], presentation: Any, bytes_bpe: Any) -> None:
    config = WordsConfig(prefix=prefix, presentation=presentation, template={"sw": "{word}"})
    (word,) = WordTokenizer(bytes_bpe, config)(["ma"], "sw")
    assert word.input_ids[: len(expected)] == expected
    # only what the tokenizer itself adds has an EOS
    assert word.input_ids[len(expected) :] == ((EOS,) if prefix == "auto" else ())
    assert [i for i, own in zip(word.input_ids, word.content, strict=True) if own] == [MA]


def test_unknown_prefix(bytes_bpe: Any) -> None:
    for prefix in ("<|endoftext|>", "", "AUTO"):
        message = rf"words\.prefix: {re.escape(repr(prefix))} is not a token.*'<s>'"
        with pytest.raises(UserError, match=message):
            WordTokenizer(bytes_bpe, WordsConfig(prefix=prefix))


@pytest.mark.parametrize("config", [WordsConfig(), template_of(swahili="mimi {word}")])
def test_word_without_tokens_is_named(config: WordsConfig, few_letters: Any) -> None:
    tokenize = WordTokenizer(few_letters, config)
    assert [sum(w.content) for w in tokenize(["maji", "jam"], "swahili")] == [4, 3]
    with pytest.raises(UserError, match=r"'ng' \(swahili\) has no token of its own; remove this"):
        tokenize(["maji", "ng"], "swahili")


letters = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60)
@given(word=letters, before=st.sampled_from(["", "maji ", "é: "]), after=st.sampled_from(["", "!"]))
def test_any_word_keeps_all_its_tokens(word: str, before: str, after: str, bytes_bpe: Any) -> None:
    tokenize = WordTokenizer(bytes_bpe, template_of(sw=f"{before}{{word}}{after}"))
    assert own_text(bytes_bpe, tokenize([word], "sw")[0]).removeprefix(" ") == word


some_words = st.lists(
    st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=6).map(
        lambda tokens: Word(*(tuple(column) for column in zip(*tokens, strict=True)))
    ),
    min_size=1,
    max_size=8,
)


@settings(deadline=None, max_examples=60)
@given(words=some_words)
def test_pack_lays_words_end_to_end(words: list[Word]) -> None:
    packed = pack(words)
    lengths = [len(w) for w in words]
    assert (packed.words, packed.longest) == (len(words), max(lengths))
    assert packed.input_ids.tolist() == [t for w in words for t in w.input_ids]
    assert packed.content.tolist() == [c for w in words for c in w.content]
    assert packed.content.dtype == torch.bool
    assert packed.position_ids.tolist() == [p for n in lengths for p in range(n)]
    assert packed.offsets.tolist() == [sum(lengths[:i]) for i in range(len(words) + 1)]


@settings(deadline=None, max_examples=60)
@given(words=some_words)
def test_rows_and_slots_undo_each_other(words: list[Word]) -> None:
    packed = pack(words)
    tokens = len(packed.input_ids)
    assert packed.rows.shape == (len(words), packed.longest)
    # from tokens to padded rows and back
    assert packed.rows.flatten()[packed.slots].tolist() == list(range(tokens))
    assert packed.slots.unique().numel() == tokens
    for row, word, start in zip(packed.rows.tolist(), words, packed.offsets.tolist(), strict=False):
        end = start + len(word)
        # a place beyond the word repeats its last token, never another word's
        assert row == [*range(start, end), *[end - 1] * (packed.longest - len(word))]
    padded = torch.full((packed.words * packed.longest,), -1)
    padded[packed.slots] = packed.input_ids
    for row, word in zip(padded.view(packed.words, -1).tolist(), words, strict=True):
        assert row == [*word.input_ids, *[-1] * (packed.longest - len(word))]


def test_pack_of_one_token(device: torch.device) -> None:
    packed = pack([Word((7,), (True,))]).to(device)
    assert packed.input_ids.device.type == packed.slots.device.type == device.type
    assert packed.offsets.tolist() == [0, 1]
    assert packed.rows.tolist() == [[0]]
    assert packed.slots.tolist() == packed.position_ids.tolist() == [0]


@settings(deadline=None, max_examples=100)
@given(lengths=st.lists(st.integers(1, 12), max_size=40), limit=st.integers(1, 20))
def test_packs_of_holds_every_word_once_within_the_limit(lengths: list[int], limit: int) -> None:
    words = [Word((0,) * n, (True,) * n) for n in lengths]
    packs = packs_of(words, limit)
    assert sorted(i for members in packs for i in members) == list(range(len(words)))
    for members in packs:
        # a word longer than the limit has a pack of its own
        assert 0 < sum(lengths[i] for i in members) <= limit or len(members) == 1
    order = [lengths[i] for members in packs for i in members]
    assert order == sorted(order)
    # as few packs as filling them one after the other takes
    for one, following in pairwise(packs):
        assert sum(lengths[i] for i in one) + lengths[following[0]] > limit


def test_packs_do_not_depend_on_the_order_of_unlike_words() -> None:
    words = [Word((0,) * n, (True,) * n) for n in range(1, 30)]
    shuffled = random.Random(0).sample(words, len(words))
    contents = [
        [[len(ws[i]) for i in members] for members in packs_of(ws, 40)] for ws in (words, shuffled)
    ]
    assert contents[0] == contents[1]


@pytest.mark.parametrize("config", [WordsConfig(), template_of(swahili="neno: {word}!")])
def test_many_words_are_tokenised_some_at_a_time(
    config: WordsConfig, bytes_bpe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"maji{i}" for i in range(11)]
    at_once = WordTokenizer(bytes_bpe, config)(texts, "swahili")
    monkeypatch.setattr("tli_engine.data.words._AT_ONCE", 4)
    assert WordTokenizer(bytes_bpe, config)(texts, "swahili") == at_once
