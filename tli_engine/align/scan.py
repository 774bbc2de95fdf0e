"""At which layer do two languages meet? One pass over the words gives every layer."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tli_engine.align.bootstrap import Resamples, bootstrap_means, too_few_pairs
from tli_engine.align.encode import stage
from tli_engine.align.layers import vectors_by_layer
from tli_engine.align.pairing import Pairing
from tli_engine.align.replay import Measure
from tli_engine.align.retrieval import Alignment, chance_mrr, read_all
from tli_engine.config import Pooling
from tli_engine.data.pairs import PairList, group_ids
from tli_engine.data.words import Word
from tli_engine.models.early import EarlyModel

# resamples expected beyond each end of an interval: fewer leave the end to chance
_DRAWS_BEYOND = 20
_LEVEL = 0.05
# a raw cosine this high, with random pairs as high, is an artefact of the first token
_ARTEFACT_COSINE = 0.95
_ARTEFACT_SEPARATION = 0.02


@dataclass(frozen=True)
class Proposal:
    """The layer a scan proposes, or none, and why.

    Attributes:
        layer: ``hidden_states`` index, or ``None``.
        best: Layer of the highest mean two-way MRR.
        interval: Bootstrap interval of that MRR, corrected for choosing among all layers.
        chance: MRR of a random order.
        reason: The decision in one sentence.
    """

    layer: int | None
    best: int
    interval: tuple[float, float]
    chance: float
    reason: str


@dataclass(frozen=True)
class Scan:
    """Figures of every layer, and the proposal."""

    model: str
    pooling: Pooling
    pairs: int
    layers: list[Alignment]
    proposal: Proposal
    warnings: list[str]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The contract of ``scan.json``."""
        return {
            "model": self.model,
            "layers": [{"layer": k, **a.to_json()} for k, a in enumerate(self.layers)],
            "pooling": self.pooling,
            "pairs": self.pairs,
            "proposed_layer": self.proposal.layer,
            "proposal": {
                "best": self.proposal.best,
                "interval": list(self.proposal.interval),
                "chance": self.proposal.chance,
                "reason": self.proposal.reason,
            },
            "warnings": self.warnings,
            "seconds": self.seconds,
        }


def scan(
    model: EarlyModel,
    name: str,
    pairs: PairList,
    source: Sequence[Word],
    target: Sequence[Word],
    pooling: Pooling,
    advance: Callable[[int], None] = lambda words: None,
    say: Callable[[str], None] = lambda line: None,
    room: int | None = None,
) -> Scan:
    """Measure the alignment of ``pairs`` at every layer of ``model``, and propose one.

    Args:
        model: The whole model, or its early blocks.
        name: What the report calls it.
        pairs: Translations.
        source: The pairs' first words, tokenised.
        target: The pairs' second words, tokenised.
        pooling: How a word's tokens become one vector.
        advance: Called with the number of words done after each pack of each layer.
        say: Called with a line if hidden states do not fit on the model's device.
        room: Bytes of it that they may take; by default what is free.
    """
    start = time.perf_counter()
    # a layer is proposed by content pooling, whatever is looked at; both come from one pass
    poolings = list(dict.fromkeys((pooling, "content")))
    staged = stage(model, [*source, *target], poolings)
    groups = group_ids(pairs.source), group_ids(pairs.target)
    rows = ([staged.row_of[word] for word in side] for side in (source, target))
    pairing = Pairing(*groups, model.device, *rows)
    measure = Measure(pairing, len(pairs))
    resamples = resamples_for(len(pairs), model.depth + 1)
    for _, vectors in vectors_by_layer(model, staged, room=room, advance=advance, say=say):
        measure.add(vectors)
    by_pooling = [read_all(of_pooling) for of_pooling in measure.figures()]
    measured = by_pooling[0]
    proposal = propose_layer(by_pooling[-1], resamples, model.device)
    warnings = _warnings(measured, proposal)
    seconds = time.perf_counter() - start
    return Scan(name, pooling, len(pairs), measured, proposal, warnings, seconds)


def resamples_for(pairs: int, layers: int, seed: int = 0) -> Resamples:
    """What :func:`propose_layer` resamples; drawn from now on, while the layers are measured."""
    draws = math.ceil(_DRAWS_BEYOND / _tail(layers))
    return Resamples(pairs, draws, columns=2, seed=seed)


def _tail(layers: int) -> float:
    """Share of resamples beyond each end of an interval, for a choice among so many layers."""
    return _LEVEL / 2 / max(1, layers - 1)


def propose_layer(
    layers: Sequence[Alignment],
    resamples: Resamples | None = None,
    device: torch.device | str = "cpu",
) -> Proposal:
    """Propose the layer of highest mean two-way MRR, if it is more than noise.

    Its bootstrap interval over pairs, at 95 % corrected for the number of layers it was chosen
    from (Bonferroni), must lie above chance and above layer 0's value, and that of the gain over
    layer 0, pair by pair, above zero; too few pairs tell nothing.

    Args:
        layers: Of the embeddings, then of each block.
        resamples: Of :func:`resamples_for`, which is called if there are none.
        device: Where they are gathered.
    """
    ranks = torch.stack([a.two_way_reciprocal_ranks for a in layers]).numpy()
    means = ranks.mean(axis=1)
    best = int(means.argmax())
    tail = _tail(len(layers))
    resamples = resamples or resamples_for(ranks.shape[1], len(layers))
    # the gain is that of the same pairs, ranked at both layers: it varies less than either
    both = np.stack([ranks[best], ranks[best] - ranks[0]], axis=1)
    means_drawn = bootstrap_means(both, resamples, device)
    (low, gain), (high, _) = np.quantile(means_drawn, (tail, 1 - tail), axis=0).tolist()
    sides = (layers[0].forward, layers[0].reverse)
    chance = sum(chance_mrr(side.candidates) for side in sides) / 2
    bar = max(chance, float(means[0]))
    few = too_few_pairs(ranks.shape[1], "it")
    found = few is None and best > 0 and low > bar and gain > 0
    reason = (
        f"with content pooling, two-way MRR is highest at layer {best}: {means[best]:.4f} "
        f"[{low:.4f}, {high:.4f}]; "
        f"chance is {chance:.4f}, layer 0 has {means[0]:.4f}"
    )
    if few is not None:
        reason += f"; {few}"
    elif not found:
        reason += "; not above both, so no layer is proposed"
    return Proposal(best if found else None, best, (low, high), chance, reason)


def _warnings(layers: Sequence[Alignment], proposal: Proposal) -> list[str]:
    warnings = []
    top = max(range(len(layers)), key=lambda k: layers[k].cosine_true)
    highest = layers[top]
    if highest.cosine_true > _ARTEFACT_COSINE and highest.separation < _ARTEFACT_SEPARATION:
        warnings.append(
            f"layer {top}'s cosine of {highest.cosine_true:.5f} is an artefact: random pairs have "
            f"{highest.cosine_random:.5f}, and the translation comes first for "
            f"{highest.forward.p_at_1:.1%} of the words; leave the first token out of the pooling "
            f"(--prefix, --pooling content)"
        )
    if proposal.layer is None:
        warnings.append(f"no layer is proposed: {proposal.reason}")
    return warnings
