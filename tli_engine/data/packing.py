"""Examples laid into rows: which ones in which row, in which order, and a row's tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tli_engine.data.examples import Example
from tli_engine.data.words import Pack, Word, pack, sent
from tli_engine.errors import UserError

# examples laid into rows together: more fill rows hardly better, and take the order's chance away
_WINDOW = 1024


def rows_of_epoch(
    lengths: npt.NDArray[np.int32], context: int, seed: int, epoch: int, packing: bool
) -> list[list[int]]:
    """The rows of an epoch, in order, as indices of examples; each example is in one of them.

    A function of its arguments alone: row ``i`` of an epoch needs no state to be found again.

    Args:
        lengths: Tokens of each example, ``[N]``; none over ``context``.
        context: Tokens of a row at the most.
        seed: Of the run.
        epoch: Counted from 0.
        packing: Lay several examples into a row, first-fit decreasing over windows of 1,024 of
            them; otherwise each has a row of its own.
    """
    if len(lengths) and int(lengths.max()) > context:
        raise ValueError(f"an example of {lengths.max()} tokens is longer than a row of {context}")
    order = _permutation(len(lengths), seed, epoch, "examples")
    if not packing:
        return [[int(i)] for i in order]
    rows: list[list[int]] = []
    for start in range(0, len(order), _WINDOW):
        rows += _first_fit_decreasing(order[start : start + _WINDOW], lengths, context)
    return [rows[i] for i in _permutation(len(rows), seed, epoch, "rows")]


def _permutation(count: int, seed: int, epoch: int, what: str) -> npt.NDArray[np.int64]:
    digest = sha256(f"{what} {seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    order: npt.NDArray[np.int64] = torch.randperm(count, generator=generator).numpy()
    return order


def _first_fit_decreasing(
    examples: npt.NDArray[np.int64], lengths: npt.NDArray[np.int32], context: int
) -> list[list[int]]:
    # as many rows as examples at the most; one that is not begun yet has all its room
    room = np.full(len(examples), context)
    rows: list[list[int]] = [[] for _ in examples]
    for i in examples[np.argsort(-lengths[examples], kind="stable")]:
        row = int(np.argmax(room >= lengths[i]))
        rows[row].append(int(i))
        room[row] -= lengths[i]
    return [row for row in rows if row]


@dataclass(frozen=True)
class TextPack:
    """Examples laid end to end, and what is to be predicted where.

    Attributes:
        words: The examples' tokens; ``content`` marks the answers.
        predicting: Positions whose next token is a label, ascending, ``[L]``, int64.
        targets: The tokens that follow them, ``[L]``, int64.
    """

    words: Pack
    predicting: Tensor
    targets: Tensor

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.words.input_ids.shape[0]

    @property
    def labels(self) -> int:
        """Number of tokens that are to be predicted."""
        return self.targets.shape[0]

    def to(self, device: torch.device) -> "TextPack":
        """Copy to a device, without waiting for it."""
        narrow = (sent(tensor, device) for tensor in (self.predicting, self.targets))
        return TextPack(self.words.to(device), *narrow)


def without_labels(pack: TextPack) -> TextPack:
    """The same tokens, none of which is to be predicted."""
    return TextPack(pack.words, pack.predicting[:0], pack.targets[:0])


def text_pack(examples: Sequence[Example]) -> TextPack:
    """Lay examples end to end; a position predicts the next one of its own example.

    Raises:
        UserError: There is no example, or none has a token to predict.
    """
    if not examples:
        raise UserError("a pack of texts needs at least one example")
    words = pack(
        [Word(e.input_ids, tuple(i >= e.prompt for i in range(len(e.input_ids)))) for e in examples]
    )
    # the first token of an example is predicted by nothing
    labels = (words.content & (words.position_ids > 0)).nonzero().squeeze(1)
    if not len(labels):
        raise UserError(
            f"none of the {len(words.input_ids)} tokens of a row is a label: every example needs a "
            f"prompt and an answer after it"
        )
    return TextPack(words, labels - 1, words.input_ids[labels])
