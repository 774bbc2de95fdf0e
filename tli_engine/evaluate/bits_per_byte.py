"""The price of alignment: how much worse the language model predicts text."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tli_engine.data.words import Word, pack
from tli_engine.errors import UserError
from tli_engine.models.causal import soft_capped
from tli_engine.models.early import EarlyModel

# tokens a piece of a line is cut to, and rows of logits held at a time
_WINDOW = 1024
_ROWS = 256


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank, each a document.

    Raises:
        UserError: Missing, not UTF-8, or blank throughout.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; save the file as UTF-8") from None
    if not lines:
        raise UserError(f"{path}: has no text")
    return lines


@torch.no_grad()
def bits_per_byte(
    model: EarlyModel,
    tokenizer: Any,
    head: Tensor,
    lines: list[str],
    advance: Callable[[int], None] = lambda lines: None,
) -> float:
    """Cross-entropy of text under the whole model, in bits for each byte of UTF-8.

    Each line stands alone, after the tokenizer's BOS token where it has one, and is cut every 1024
    tokens, or as many as a shorter attention window holds; without a BOS token the first token of
    each piece is given, not predicted.

    Args:
        model: All blocks.
        tokenizer: The model's.
        head: Output embeddings, ``[V, D]``.
        lines: Documents.
        advance: Called with the number of lines done.
    """
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    attention_window = getattr(model.config, "sliding_window", None) or _WINDOW + len(start)
    step = min(_WINDOW, attention_window - len(start))
    bits, size = 0.0, 0
    for line in lines:
        ids = tokenizer(line, add_special_tokens=False)["input_ids"]
        for i in range(0, len(ids), step):
            bits += _bits(model, head, [*start, *ids[i : i + step]])
        size += len(line.encode())
        advance(1)
    return bits / size


def _bits(model: EarlyModel, head: Tensor, ids: list[int]) -> float:
    words = pack([Word(tuple(ids), (True,) * len(ids))]).to(model.device)
    hidden = model(words, model.depth)[:-1]
    labels = words.input_ids[1:]
    nats = 0.0
    for rows, targets in zip(hidden.split(_ROWS), labels.split(_ROWS), strict=True):  # type: ignore[no-untyped-call]
        logits = soft_capped((rows @ head.T).float(), model.config)
        nats += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    return nats / math.log(2)
