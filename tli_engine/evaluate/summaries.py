"""Summaries that a model writes, and what they are worth beside summaries that cost nothing."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from tli_engine.config import DataConfig
from tli_engine.data.texts import Article, Texts
from tli_engine.errors import UserError
from tli_engine.evaluate.text_metrics import tokenizer_of
from tli_engine.models.causal import CausalModel
from tli_engine.models.generate import GenerateOptions, generate

# file of a run's summaries
PREDICTIONS = "predictions.jsonl"
METRICS = {
    "bleu": "BLEU",
    "chrf": "chrF++",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
}
# mean length of what stands between spaces, in characters, from which on it is no word
_LONG_WORDS = 12
# options of generation that make summaries others
_DECODING = ("max_new_tokens", "beams", "temperature", "top_p", "seed")


def language_of(data: DataConfig) -> str | None:
    """The language that summaries are in, where the configuration or its preset says it."""
    preset, _, language = (data.texts or "").partition(":")
    return data.language or (language if preset == "xlsum" else None)


def spacing_warning(articles: Sequence[Article], language: str | None) -> str | None:
    """A line if texts are scored by the words between their spaces, of which they have hardly any."""
    if tokenizer_of(language) != "13a":
        return None
    texts = [a.text for a in articles], [a.summary for a in articles]
    longest = max(_letters_a_word(side) for side in texts)
    if longest <= _LONG_WORDS:
        return None
    named = "no language is named" if language is None else f"{language!r} is not known as such"
    return (
        f"the texts have hardly any spaces, one in {longest:.0f} characters, and BLEU and ROUGE "
        f"count what stands between them: {named}; set data.language, e.g. chinese, japanese, thai"
    )


def _letters_a_word(texts: Sequence[str]) -> float:
    words = [word for text in texts for word in text.split()]
    return sum(map(len, words)) / max(1, len(words))


@dataclass(frozen=True)
class Written:
    """Summaries in the articles' order, and what they took.

    Attributes:
        summaries: One an article.
        tokens: Written in all, ends included.
        seconds: Of generation.
    """

    summaries: list[str]
    tokens: int
    seconds: float

    def to_json(self) -> dict[str, float]:
        """What they took."""
        return {
            "articles": len(self.summaries),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_s": self.tokens / max(self.seconds, 1e-9),
        }


def write_summaries(
    model: CausalModel,
    tokenizer: Any,
    prompts: Sequence[tuple[int, ...]],
    options: GenerateOptions,
    advance: Callable[[int, str], None] = lambda articles, note: None,
) -> Written:
    """Let a model summarise articles.

    Args:
        model: All blocks and the head.
        tokenizer: The model's.
        prompts: Tokens of each article's, which leave room for the answer.
        options: Of generation.
        advance: Told of articles that are done, and of the speed so far.
    """
    start = time.perf_counter()
    generated = generate(model, prompts, options, advance)
    seconds = time.perf_counter() - start
    summaries = [
        tokenizer.decode(list(g.tokens), skip_special_tokens=True).strip() for g in generated
    ]
    return Written(summaries, sum(len(g.tokens) + g.ended for g in generated), seconds)


def predictions_text(summaries: Sequence[str]) -> str:
    """JSON Lines: the number of an article from 0 on, and its summary."""
    lines = ({"number": i, "prediction": text} for i, text in enumerate(summaries))
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def predictions_record(
    text: str, texts: Texts, options: GenerateOptions, strength: float = 1.0
) -> dict[str, Any]:
    """What summaries are, for the JSON beside them: their file's hash, their articles, the decoding.

    Args:
        text: Of :func:`predictions_text`.
        texts: The articles.
        options: With which they were written.
        strength: Of the adapter, which counts as one of them.
    """
    return {
        "sha256": sha256(text.encode()).hexdigest(),
        "articles": texts.identity(),
        "decoding": {name: getattr(options, name) for name in _DECODING}
        | {"eos_token_ids": sorted(options.eos_token_ids), "strength": strength},
    }


def read_predictions(path: Path, digest: str | None = None) -> list[str]:
    """Summaries as :func:`predictions_text` wrote them.

    Args:
        path: Of the file.
        digest: SHA-256 that it must have; None for any.

    Raises:
        UserError: Missing, malformed or another file.
    """
    try:
        content = path.read_bytes()
        if digest not in (None, sha256(content).hexdigest()):
            raise UserError(
                f"{path}: is not what was written with the figures beside it; delete those "
                "(result.json, evaluation.json) and make both again"
            )
        # a summary may hold other separators of lines, which splitlines() minds
        lines = content.decode().split("\n")[:-1]
        rows = [json.loads(line) for line in lines]
        if [row["number"] for row in rows] == list(range(len(rows))):
            return [str(row["prediction"]) for row in rows]
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; it is written by tli-engine evaluate") from None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: cannot be read: {e!r}") from None
    raise UserError(f"{path}: its numbers are not 0, 1, 2, …: it is not whole")
