"""Packs of texts filled up to few shapes: each has its CUDA graph, and few are to be captured."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tli_engine.data.packing import TextPack
from tli_engine.distributed.world import ALONE, World
from tli_engine.train.device_buffer import DeviceBuffer, Layout
from tli_engine.train.staging import padded

# documents without tokens cost nothing, labels without weight little
_FEWEST_DOCUMENTS, _FEWEST_LABELS = 8, 64


@dataclass(frozen=True)
class Shape:
    """What a graph knows of the packs that it runs.

    Attributes:
        tokens: Those of no text among them.
        documents: Those without tokens among them.
        labels: Those of weight 0 among them.
        longest: Tokens that a document has at most.
        seeds: Of dropout masks.
    """

    tokens: int
    documents: int
    labels: int
    longest: int
    seeds: int


@dataclass(frozen=True)
class FilledTexts:
    """A pack of T tokens in S documents with L labels; the last of each may belong to no text.

    Attributes:
        input_ids: Token ids, ``[T]``, int64; 0 for tokens of no text.
        position_ids: Position of each token in its document, ``[T]``, int64.
        offsets: First token of each document, then ``T``; ``[S + 1]``, int32.
        predicting: Positions whose next token is predicted, ``[L]``, int64.
        targets: Those tokens, ``[L]``, int64.
        weights: 1, or 0 for labels of no text, ``[L]``, fp32.
        scale: One over the labels of a step, a scalar, fp32.
        seeds: Of the dropout masks, int64.
        longest: Tokens that a document has at most.
    """

    input_ids: Tensor
    position_ids: Tensor
    offsets: Tensor
    predicting: Tensor
    targets: Tensor
    weights: Tensor
    scale: Tensor
    seeds: Tensor
    longest: int

    @property
    def words(self) -> "FilledTexts":
        """The documents."""
        return self


class FilledBuffer(DeviceBuffer[FilledTexts]):
    """A filled pack's tensors on a device, and how they get there."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        layout: Layout = {
            "input_ids": (torch.int64, (shape.tokens,)),
            "position_ids": (torch.int64, (shape.tokens,)),
            "offsets": (torch.int32, (shape.documents + 1,)),
            "predicting": (torch.int64, (shape.labels,)),
            "targets": (torch.int64, (shape.labels,)),
            "weights": (torch.float32, (shape.labels,)),
            "scale": (torch.float32, ()),
            "seeds": (torch.int64, (shape.seeds,)),
        }

        def make(**tensors: Tensor) -> FilledTexts:
            return FilledTexts(**tensors, longest=shape.longest)

        super().__init__(make, layout, device)


def shape_of(pack: TextPack, longest: int, seeds: int, world: World = ALONE) -> Shape:
    """The shape to which a pack is filled up.

    Args:
        pack: On the host.
        longest: Tokens that any document may have.
        seeds: Of dropout masks.
        world: Ranks whose packs are all filled up to it; each gives its own.
    """
    count, words = pack.tokens, pack.words
    own = (max(longest, words.longest), count, -count, words.words, -words.words, pack.labels)
    longest, most, least, documents, fewest, labels = map(int, world.largest(own))
    tokens = padded(most)
    if tokens != documents * longest or tokens != -least or documents != -fewest:
        # not all of one length: a batch of such attends faster
        documents += -(-(tokens + least) // longest)
        documents = max(_FEWEST_DOCUMENTS, _power_of_two(documents))
    return Shape(tokens, documents, _filled_labels(labels), longest, seeds)


def _power_of_two(count: int) -> int:
    """The least one that is not below ``count``."""
    return 1 << (count - 1).bit_length()


def _filled_labels(labels: int) -> int:
    """Labels that a pack gets: at most a quarter, or 63, of no text."""
    step = max(_FEWEST_LABELS, _power_of_two(labels) // 8)
    return -(-labels // step) * step


def fill(texts: FilledTexts, pack: TextPack, labels: int) -> None:
    """Write a pack into tensors on the host; seeds are left as they are.

    What is left of the tokens makes documents of its own, which predict nothing; further documents have
    no token, and further labels weigh nothing.

    Args:
        texts: At least as large as :func:`shape_of` says.
        pack: On the host.
        labels: Of the whole step.
    """
    tokens, total, count = pack.tokens, len(texts.input_ids), pack.labels
    ids, positions, offsets = (
        t.numpy() for t in (texts.input_ids, texts.position_ids, texts.offsets)
    )
    rest = np.arange(total - tokens)
    ids[:tokens], ids[tokens:] = pack.words.input_ids.numpy(), 0
    positions[:tokens] = pack.words.position_ids.numpy()
    positions[tokens:] = rest % texts.longest
    ends = np.append(np.arange(tokens, total, texts.longest), total)
    offsets[:] = total
    offsets[: pack.words.words] = pack.words.offsets[:-1].numpy()
    offsets[pack.words.words :][: len(ends)] = ends
    predicting, targets, weights = (
        t.numpy() for t in (texts.predicting, texts.targets, texts.weights)
    )
    # any row will do, not one alone: gradients of one row are added up in turn
    predicting[:count] = pack.predicting.numpy()
    predicting[count:] = np.arange(len(predicting) - count) % total
    targets[:count], targets[count:] = pack.targets.numpy(), 0
    weights[:count], weights[count:] = 1, 0
    # as a GPU divides by a number
    texts.scale.fill_(float(np.float32(1) / np.float32(labels)))
