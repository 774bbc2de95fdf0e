import errno
import re
import tempfile
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tli_engine.config import PromptConfig
from tli_engine.data import examples as examples_module
from tli_engine.data.examples import Example, ExampleTokenizer, tokenise
from tli_engine.data.texts import Article
from tli_engine.errors import UserError

CONTEXT = 64
PLAIN = PromptConfig(template="plain", instruction="Fupi:\n{text}\nJibu:")
CHAT = PromptConfig(template="chat", instruction="Fupi: {text}")
SPECIAL = ["<s>", "</s>", "<turn>", "<end>"]
TURNS = (
    "{{ bos_token }}{% for m in messages %}<turn>{{ m.role }}\n{{ m.content | trim }}<end>\n"
    "{% endfor %}{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
# as Mistral's: a space before the answer, which is no part of the prompt
SPACED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% else %}"
    " {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# as Qwen3's: thoughts, unless they are turned off
THINKING = TURNS.replace(
    "<turn>assistant\n{%",
    "<turn>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{%",
)

# as TURNS, with the assistant's header beside an answer only
HEADED = TURNS.partition("{% if add_generation_prompt")[0]
HEADED_SPACED = HEADED.replace("{{ m.role }}\n{{", "{{ m.role }}: {{")


def fast(tokenizer: Tokenizer, template: str | None = None) -> Any:
    """The tokenizer as transformers has it; it adds <s> before a text and </s> after it."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    result = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL[2:],
    )
    result.chat_template = template
    return result


def byte_tokenizer(template: str | None = None) -> Any:
    """A token a byte, and one for ``ab``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {t: i for i, t in enumerate([*SPECIAL, *alphabet, "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return fast(tokenizer, template)


def spaced_tokenizer() -> Any:
    """As SentencePiece's: every text that begins gets a space, ``▁``."""
    alphabet = ["<unk>", "▁", *sorted(set("Fupi: \nJbuHabrtshMw.")), "▁H", "▁M"]
    vocabulary = {t: i for i, t in enumerate([*SPECIAL, *alphabet])}
    merges = [("▁", "H"), ("▁", "M")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return fast(tokenizer)


def article(text: str, summary: str = "fupi", number: int = 1) -> Article:
    return Article(text, summary, f"news.jsonl: line {number}")


def one(tokenizer: Any, config: PromptConfig, of: Article, context: int = CONTEXT) -> Example:
    (example,) = ExampleTokenizer(tokenizer, config, context)([of])
    return example


def parts(tokenizer: Any, example: Example) -> tuple[str, str]:
    ids = list(example.input_ids)
    return tokenizer.decode(ids[: example.prompt]), tokenizer.decode(ids[example.prompt :])


def test_plain() -> None:
    tokenizer = byte_tokenizer(TURNS)
    example = one(tokenizer, PLAIN, article(" Habari.\n", "Muhtasari \n"))
    assert parts(tokenizer, example) == ("<s>Fupi:\nHabari.\nJibu:", " Muhtasari</s>")
    assert example.input_ids.count(0) == example.input_ids.count(1) == 1
    assert len(example) == len(example.input_ids)


def test_an_instruction_that_ends_in_a_line_break_needs_no_space() -> None:
    tokenizer = byte_tokenizer()
    example = one(tokenizer, PromptConfig(instruction="{text}\n"), article("ab", "ab"))
    assert parts(tokenizer, example) == ("<s>ab\n", "ab</s>")


@pytest.mark.parametrize(
    ("template", "prompt", "answer"),
    [
        (TURNS, "<s><turn>user\nFupi: Habari<end>\n<turn>assistant\n", "fupi<end>"),
        (SPACED, "<s>[Fupi: Habari]", " fupi</s>"),
        (
            THINKING,
            "<s><turn>user\nFupi: Habari<end>\n<turn>assistant\n<think>\n\n</think>\n\n",
            "fupi<end>",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["auto", "chat"])
def test_chat(kind: Any, template: str, prompt: str, answer: str) -> None:
    tokenizer = byte_tokenizer(template)
    config = CHAT.model_copy(update={"template": kind})
    tokenize = ExampleTokenizer(tokenizer, config, 200)
    (example,) = tokenize([article("Habari")])
    assert parts(tokenizer, example) == (prompt, answer)
    assert example.input_ids.count(0) == 1
    assert example.input_ids[-1] == tokenize.end
    message = {"role": "user", "content": "Fupi: Habari"}
    ids = tokenizer.apply_chat_template(
        [message], add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    assert list(example.input_ids[: example.prompt]) == ids


@pytest.mark.parametrize(
    ("template", "prompt", "answer"),
    [
        (HEADED, "<s><turn>user\nFupi: Habari<end>\n<turn>assistant\n", "fupi<end>"),
        (HEADED_SPACED, "<s><turn>user: Fupi: Habari<end>\n<turn>assistant:", " fupi<end>"),
    ],
)
def test_a_header_that_stands_beside_an_answer_only(
    template: str, prompt: str, answer: str
) -> None:
    tokenizer = byte_tokenizer(template)
    tokenize = ExampleTokenizer(tokenizer, CHAT, 200)
    (example,) = tokenize([article("Habari")])
    assert parts(tokenizer, example) == (prompt, answer)
    assert tokenize.prompt_ids(article("Habari")) == example.input_ids[: example.prompt]


def test_an_end_of_turn_that_has_no_role() -> None:
    """As Gemma 3's: special, but neither ``eos_token`` nor an additional special token by name."""
    tokenizer = byte_tokenizer(TURNS.replace("<end>", "<end_of_turn>"))
    tokenizer.add_tokens([AddedToken("<end_of_turn>", special=True)])
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert end not in tokenizer.all_special_ids
    tokenize = ExampleTokenizer(tokenizer, CHAT, 200)
    (example,) = tokenize([article("Habari")])
    assert parts(tokenizer, example)[1] == "fupi<end_of_turn>"
    assert example.input_ids[-1] == tokenize.end == end


def test_a_template_that_leaves_out_the_answer() -> None:
    template = "{{ messages[0].content }}{% if messages | length > 1 %} and more{% endif %}"
    example = one(byte_tokenizer(template), CHAT, article("Habari"))
    assert parts(byte_tokenizer(), example) == ("Fupi: Habari", "fupi</s>")


def test_auto_is_plain_without_a_chat_template() -> None:
    config = PLAIN.model_copy(update={"template": "auto"})
    expected = one(byte_tokenizer(), PLAIN, article("Habari"))
    assert one(byte_tokenizer(), config, article("Habari")) == expected


def test_an_answer_continues_its_prompt() -> None:
    """It has the tokens that it has after the prompt, not those of a text that begins."""
    tokenizer = spaced_tokenizer()
    example = one(tokenizer, PLAIN, article("Habari", "Muhtasari"))
    whole = "Fupi:\nHabari\nJibu: Muhtasari"
    assert list(example.input_ids) == tokenizer(whole)["input_ids"]
    assert parts(tokenizer, example)[1] == "Muhtasari</s>"
    assert tokenizer.decode(example.input_ids) == f"<s> {whole}</s>"


def test_an_answer_whose_first_letter_would_merge_into_the_prompt() -> None:
    tokenizer = byte_tokenizer()
    config = PromptConfig(template="plain", instruction="{text}\na")
    # no space between, so that "a" and "b" could become one token
    tokenize = ExampleTokenizer(tokenizer, config, CONTEXT)
    tokenize._frame = examples_module._Frame("", "\na", "", 1)
    (example,) = tokenize([article("x", "bb")])
    assert parts(tokenizer, example) == ("<s>x\na", "bb</s>")


@given(
    st.text(st.sampled_from("ab é日\n<"), max_size=120).filter(str.strip),
    st.text(st.sampled_from("ab é"), min_size=1, max_size=8).filter(str.strip),
    st.sampled_from([PLAIN, CHAT]),
    st.integers(70, 100),
)
def test_an_article_is_cut_at_its_end_and_an_answer_never(
    text: str, summary: str, config: PromptConfig, context: int
) -> None:
    tokenizer = byte_tokenizer(TURNS)
    example = one(tokenizer, config, article(text, summary), context)
    whole = one(tokenizer, config, article(text, summary), 10_000)
    assert len(example) <= context
    if len(whole) <= context:
        assert example == whole
        return
    before, after = (
        ("<s>Fupi:\n", "\nJibu:")
        if config is PLAIN
        else ("<s><turn>user\nFupi: ", "<end>\n<turn>assistant\n")
    )
    prompt, answer = parts(tokenizer, example)
    assert prompt.startswith(before)
    assert prompt.endswith(after)
    kept = prompt.removeprefix(before).removesuffix(after)
    assert kept
    assert text.strip().startswith(kept)
    assert answer == parts(tokenizer, whole)[1]
    # all that fits is kept: the next word with the spaces before it, a letter of 3 bytes at the most
    rest = text.strip()[len(kept) :]
    more = len(rest) - len(rest.lstrip()) + 1
    longer = one(tokenizer, config, article(kept + rest[: more + 1], summary), 10_000)
    assert len(longer) > context or rest[:more].isspace()


def test_examples_do_not_depend_on_their_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    articles = [article("Habari " * n, "ab" * n, n) for n in range(1, 8)]
    tokenize = ExampleTokenizer(byte_tokenizer(), PLAIN, CONTEXT)
    expected = tokenize(articles)
    assert [tokenize([a])[0] for a in articles] == expected
    monkeypatch.setattr(examples_module, "_AT_ONCE", 3)
    assert tokenize(articles) == expected
    assert tokenize([]) == []


@pytest.mark.parametrize(
    ("text", "summary"),
    [
        pytest.param("Habari", "b" * 60, id="answer-and-instruction-do-not-fit"),
        pytest.param("Habari", "b" * 100, id="answer-alone-does-not-fit"),
        pytest.param("Habari", "b" * (CONTEXT - 15), id="no-room-for-the-article"),
    ],
)
def test_an_answer_that_does_not_fit(text: str, summary: str) -> None:
    tokenize = ExampleTokenizer(byte_tokenizer(), PLAIN, CONTEXT)
    with pytest.raises(UserError) as caught:
        tokenize([article("a"), article(text, summary, 7)])
    tokens = len(summary) + 2
    assert str(caught.value) == (
        f"news.jsonl: line 7: {tokens} tokens of the answer and 13 of the prompt leave no room for "
        f"the article in a context of 64; raise sft.context or leave this article out"
    )


def test_an_article_of_a_preset_cannot_be_left_out() -> None:
    tokenize = ExampleTokenizer(byte_tokenizer(), PLAIN, CONTEXT)
    of = article("Habari", "b" * 60)._replace(where="xlsum:swahili, train: row 7")
    with pytest.raises(UserError) as caught:
        tokenize([of])
    assert str(caught.value).endswith(
        "; raise sft.context, or train on a file of these articles without this one (data.texts)"
    )


def test_an_answer_that_just_fits() -> None:
    tokenizer = byte_tokenizer()
    example = one(tokenizer, PLAIN, article("Habari", "b" * (CONTEXT - 16)))
    assert len(example) == CONTEXT
    assert parts(tokenizer, example)[0] == "<s>Fupi:\nH\nJibu:"


def test_the_prompt_alone_leaves_room_for_new_tokens() -> None:
    tokenizer = byte_tokenizer()
    tokenize = ExampleTokenizer(tokenizer, PLAIN, CONTEXT)
    (example,) = tokenize([article("Habari")])
    assert tokenize.prompt_ids(article("Habari")) == example.input_ids[: example.prompt]
    long = article("Habari" * 100)
    assert len(tokenize.prompt_ids(long)) == CONTEXT
    assert len(tokenize.prompt_ids(long, 20)) == CONTEXT - 20
    message = (
        "news.jsonl: line 1: 60 new tokens and 13 of the prompt leave no room for the article in a "
        "context of 64; lower --max-new-tokens (compare.max_new_tokens of a comparison)"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        tokenize.prompt_ids(long, 60)


def test_tokenizers_that_do_not_serve() -> None:
    with pytest.raises(UserError, match=r"prompt\.template: this tokenizer has no chat template;"):
        ExampleTokenizer(byte_tokenizer(), CHAT, CONTEXT)
    with pytest.raises(UserError, match=r"template fails: no users; use plain$"):
        ExampleTokenizer(byte_tokenizer("{{ raise_exception('no users') }}"), CHAT, CONTEXT)
    with pytest.raises(UserError, match=r"does not show the article; use plain$"):
        ExampleTokenizer(byte_tokenizer("{{ bos_token }}"), CHAT, CONTEXT)
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="has no end-of-sequence token"):
        ExampleTokenizer(tokenizer, PLAIN, CONTEXT)


class _List(list[Article]):
    name = "news.jsonl"


def test_examples_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples_module, "_AT_ONCE", 4)
    texts: Any = _List(article("Habari " * n, "b" * n, n) for n in range(1, 11))
    tokenize = ExampleTokenizer(byte_tokenizer(), PLAIN, CONTEXT)
    done: list[int] = []
    store = tokenise(texts, tokenize, done.append)
    expected = tokenize(texts)
    assert [store[i] for i in range(len(store))] == expected
    assert store[3] == expected[3]
    assert store.lengths.dtype == np.int32
    assert store.lengths.tolist() == [len(e) for e in expected]
    assert store.prompts.tolist() == [e.prompt for e in expected]
    assert done == [4, 4, 2]
    assert isinstance(store._tokens, np.memmap)
    assert len(tokenise(_List(), tokenize)) == 0  # type: ignore[arg-type]


def test_no_space_for_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *error: object) -> None: ...

        def write(self, content: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(examples_module, "TemporaryFile", Full)
    texts: Any = _List([article("Habari")])
    with pytest.raises(UserError, match=r"no space for the tokens of news\.jsonl; set TMPDIR") as e:
        tokenise(texts, ExampleTokenizer(byte_tokenizer(), PLAIN, CONTEXT))
    assert str(e.value).startswith(tempfile.gettempdir())
