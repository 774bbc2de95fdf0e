"""Articles as tokens: a prompt with the article in it, and the answer that is learnt."""

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from tempfile import TemporaryFile, gettempdir
from typing import Any

import numpy as np
import numpy.typing as npt

from tli_engine.config import PRESETS, PromptConfig
from tli_engine.data.texts import Article, Texts
from tli_engine.errors import UserError

# articles tokenised at once: what a tokenizer returns of a text takes many times its own memory
_AT_ONCE = 256
# stand in a rendered conversation where the article and the answer go
_ARTICLE, _ANSWER = "@@article@@", "@@answer@@"

# what to do about an answer that is too long: a preset's article cannot be left out
_MEND_FILE = "raise sft.context or leave this article out"
_MEND_PRESET = (
    "raise sft.context, or train on a file of these articles without this one (data.texts)"
)


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and its answer: ``input_ids[prompt:]``, the end of sequence included."""

    input_ids: tuple[int, ...]
    prompt: int

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class _Frame:
    """What stands around an article, between prompt and answer, and after the answer."""

    before: str
    after: str
    gap: str
    end: int


class ExampleTokenizer:
    """Turns articles into examples that fit a context; an article is cut at its end for that.

    A prompt's tokens are those of its text: of the tokenizer's chat template, or of the instruction
    alone after what the tokenizer puts before every text. An answer is never cut.

    Args:
        tokenizer: Of transformers.
        config: The instruction, and whether it is put into a chat template.
        context: Tokens of an example at the most.

    Raises:
        UserError: No end-of-sequence token, or no chat template that can be used where one is asked
            for.
    """

    def __init__(self, tokenizer: Any, config: PromptConfig, context: int) -> None:
        self._tokenizer = tokenizer
        self._context = context
        if tokenizer.eos_token_id is None:
            raise UserError("this model's tokenizer has no end-of-sequence token to end a summary")
        if config.template == "chat" and not tokenizer.chat_template:
            raise UserError("prompt.template: this tokenizer has no chat template; use plain")
        self._prefix: list[int] = []
        if tokenizer.chat_template and config.template != "plain":
            self._frame = _chat_frame(tokenizer, config.instruction)
        else:
            before, _, after = config.instruction.partition("{text}")
            gap = "" if config.instruction[-1:].isspace() else " "
            self._frame = _Frame(before, after, gap, tokenizer.eos_token_id)
            self._prefix = _put_before_texts(tokenizer)
        self._tail = self._ids([self._frame.after])[0] if self._frame.after else []

    @property
    def end(self) -> int:
        """The token after an answer: what the chat template ends a turn with, or ``eos_token``."""
        return self._frame.end

    def __call__(self, articles: Sequence[Article]) -> list[Example]:
        """Tokenise articles and their summaries.

        Raises:
            UserError: An answer that does not fit the context with the instruction and some of its
                article, which is named.
        """
        examples: list[Example] = []
        for start in range(0, len(articles), _AT_ONCE):
            batch = articles[start : start + _AT_ONCE]
            answers = self._answers([article.summary for article in batch])
            prompts = self._ids([self._text(article.text) for article in batch])
            for article, prompt, answer in zip(batch, prompts, answers, strict=True):
                what = f"{len(answer)} tokens of the answer"
                remedy = _MEND_PRESET if article.where.startswith(PRESETS) else _MEND_FILE
                prompt = self._fitting(article, prompt, len(answer), what, remedy)
                examples.append(Example((*prompt, *answer), len(prompt)))
        return examples

    def prompt_ids(self, article: Article, new_tokens: int = 0) -> tuple[int, ...]:
        """The prompt alone, cut so that ``new_tokens`` still fit the context after it.

        Raises:
            UserError: They leave no room for any of the article.
        """
        (prompt,) = self._ids([self._text(article.text)])
        remedy = "lower --max-new-tokens (compare.max_new_tokens of a comparison)"
        return tuple(self._fitting(article, prompt, new_tokens, f"{new_tokens} new tokens", remedy))

    def _text(self, article: str) -> str:
        return f"{self._frame.before}{article.strip()}{self._frame.after}"

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text, none added; ``verbose`` is of lengths that the context minds."""
        encoded = self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _answers(self, summaries: Sequence[str]) -> list[list[int]]:
        """Tokens of each summary as they continue a prompt, then the end of sequence."""
        texts = [f"{self._frame.gap}{summary.strip()}" for summary in summaries]
        alone = self._ids(texts)
        # some tokenizers put a space before a text that continues nothing
        joined = self._ids([f"{self._frame.after}{text}" for text in texts])
        size = len(self._tail)
        return [
            [*(j[size:] if j[:size] == self._tail else a), self.end]
            for a, j in zip(alone, joined, strict=True)
        ]

    def _fitting(
        self, article: Article, prompt: list[int], after: int, what: str, remedy: str
    ) -> list[int]:
        """The prompt's tokens, of a shorter article if need be, to leave room for ``after``.

        ``what`` they are and the ``remedy`` stand in the error if there is no room for the article.
        """
        room = self._context - len(self._prefix) - after
        begin, text = len(self._frame.before), article.text.strip()
        while len(prompt) > room:
            encoded = self._tokenizer(
                self._text(text),
                add_special_tokens=False,
                return_offsets_mapping=True,
                verbose=False,
            )
            prompt = encoded["input_ids"]
            own = [a for a, b in encoded["offset_mapping"] if begin <= a < b <= begin + len(text)]
            excess = len(prompt) - room
            if excess <= 0:
                break
            # the seam may take other tokens than before: then a few more go
            text = text[: own[-excess] - begin].rstrip() if excess < len(own) else ""
            if not text:
                rest = len(self._prefix) + len(prompt) - len(own)
                raise UserError(
                    f"{article.where}: {what} and {rest} of the prompt leave no room for the "
                    f"article in a context of {self._context}; {remedy}"
                )
        return [*self._prefix, *prompt]


def _put_before_texts(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts before a text."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    special = encoded["special_tokens_mask"]
    ids: list[int] = encoded["input_ids"]
    return ids[: special.index(0)] if 0 in special else []


def _chat_frame(tokenizer: Any, instruction: str) -> _Frame:
    """Render a conversation once, and read off what stands around article and answer."""
    user = {"role": "user", "content": instruction.replace("{text}", _ARTICLE)}
    assistant = {"role": "assistant", "content": _ANSWER}
    # models that may think before they answer are shown an answer without thoughts
    options = {"tokenize": False, "enable_thinking": False}
    try:
        prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, **options)
        whole = tokenizer.apply_chat_template([user, assistant], **options)
    except Exception as e:
        # a template is a program of the model's authors: it may raise anything
        reason = str(e).strip().partition("\n")[0] or type(e).__name__
        raise UserError(f"prompt.template: the chat template fails: {reason}; use plain") from None
    if prompt.count(_ARTICLE) != 1:
        raise UserError("prompt.template: the chat template does not show the article; use plain")
    before, _, after = prompt.partition(_ARTICLE)
    shown, _, rest = whole.partition(_ANSWER)
    begins_so = _ANSWER in whole and shown.startswith(prompt)
    between = shown.removeprefix(prompt) if begins_so else ""
    # some templates show the assistant's header beside an answer only; a space is the answer's
    header = "" if between.isspace() else between.rstrip(" ")
    first = tokenizer(rest.lstrip(), add_special_tokens=False)["input_ids"][:1]
    ends_turn = first and _is_special(tokenizer, first[0])
    end = first[0] if ends_turn else tokenizer.eos_token_id
    return _Frame(before, after + header, between.removeprefix(header), end)


def _is_special(tokenizer: Any, token: int) -> bool:
    # all_special_ids has those alone that have a role, such as eos_token; Gemma 3's end of turn has none
    added = tokenizer.added_tokens_decoder.get(token)
    return token in tokenizer.all_special_ids or (added is not None and added.special)


class ExampleStore:
    """Examples in a file that is mapped into memory, not read; gone with the process.

    Attributes:
        lengths: Tokens of each example, ``[N]``, int32.
        prompts: Tokens of each example's prompt, ``[N]``, int32.
    """

    def __init__(
        self,
        tokens: npt.NDArray[np.uint32],
        lengths: npt.NDArray[np.int32],
        prompts: npt.NDArray[np.int32],
    ) -> None:
        self._tokens = tokens
        self.lengths = lengths
        self.prompts = prompts
        self._ends = np.cumsum(lengths, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def digest(self) -> str:
        """SHA-256 over all tokens, and where examples and their answers begin."""
        digest = sha256()
        for part in (self.lengths, self.prompts, self._tokens):
            digest.update(part.data)
        return digest.hexdigest()

    def __getitem__(self, index: int) -> Example:
        end = int(self._ends[index])
        tokens = self._tokens[end - int(self.lengths[index]) : end]
        return Example(tuple(tokens.tolist()), int(self.prompts[index]))


def tokenise(
    texts: Texts, tokenizer: ExampleTokenizer, advance: Callable[[int], None] = lambda count: None
) -> ExampleStore:
    """Tokenise every article once, in batches, into a temporary file.

    Args:
        texts: The articles.
        tokenizer: Turns them into examples.
        advance: Told of each batch's articles when they are done.

    Raises:
        UserError: As :class:`ExampleTokenizer`, or no space for the file.
    """
    lengths = np.zeros(len(texts), dtype=np.int32)
    prompts = np.zeros(len(texts), dtype=np.int32)
    # unlinked: the mapping keeps it
    with TemporaryFile() as file:
        for start in range(0, len(texts), _AT_ONCE):
            batch = slice(start, min(start + _AT_ONCE, len(texts)))
            examples = tokenizer([texts[i] for i in range(batch.start, batch.stop)])
            lengths[batch] = [len(e) for e in examples]
            prompts[batch] = [e.prompt for e in examples]
            try:
                file.write(np.array([t for e in examples for t in e.input_ids], np.uint32).data)
                file.flush()
            except OSError as e:
                if e.errno != errno.ENOSPC:
                    raise
                raise UserError(
                    f"{gettempdir()}: no space for the tokens of {texts.name}; set TMPDIR to a "
                    f"folder with more"
                ) from None
            advance(len(examples))
        tokens = np.memmap(file, np.uint32, "r") if len(texts) else np.zeros(0, np.uint32)
    return ExampleStore(tokens, lengths, prompts)
