"""Alignment before and after training, on the pairs trained on and on pairs never seen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tli_engine.align.encode import encode
from tli_engine.align.retrieval import Alignment, distinct, measure_alignment
from tli_engine.align.space import fit_space
from tli_engine.config import Pooling, Presentation, Space
from tli_engine.data.splits import Split
from tli_engine.evaluate.statistics import bootstrap_ci95, paired_tests
from tli_engine.models.adapters import adapter_strength, adapters_off
from tli_engine.models.early import EarlyModel

_SCORES: dict[str, Space] = {"cosine": "raw", "centred": "centred", "whitened": "whitened"}


@dataclass(frozen=True)
class Row:
    """One line of the report: a layer, a score and a split, before and after training."""

    layer: int
    pooling: Pooling
    presentation: Presentation
    score: str
    split: str
    strength: float
    before: Alignment
    after: Alignment

    def to_json(self) -> dict[str, Any]:
        """The contract's keys, with tests on each pair's cosine and on its reciprocal rank."""
        ranks = [a.two_way_reciprocal_ranks.numpy() for a in (self.before, self.after)]
        cosines = [a.true.cpu().numpy() for a in (self.before, self.after)]
        return {
            "layer": self.layer,
            "pooling": self.pooling,
            "presentation": self.presentation,
            "score": self.score,
            "split": self.split,
            "strength": self.strength,
            "pairs": len(cosines[0]),
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "tests": {
                **paired_tests(*cosines),
                "mrr": {**paired_tests(*ranks), "after_ci95": bootstrap_ci95(ranks[1])},
            },
        }


@dataclass(frozen=True)
class Vectors:
    """A split's vectors at one layer, ``[2 N, D]``: all sources, then all targets."""

    split: Split
    before: Tensor
    after: Tensor


def encode_before_after(
    model: EarlyModel,
    split: Split,
    layers: Sequence[int],
    pooling: Pooling,
    strength: float = 1.0,
    advance: Callable[[int], None] = lambda words: None,
) -> dict[int, Vectors]:
    """Vectors of the base model and of the adapted one, by layer; layers ascend."""
    with adapter_strength(model, strength):
        after = encode(model, split.words, layers, pooling, advance)
    with adapters_off(model):
        before = encode(model, split.words, layers, pooling, advance)
    return {k: Vectors(split, b, a) for k, b, a in zip(layers, before, after, strict=True)}


def alignment_rows(
    vectors: list[Vectors],
    layer: int,
    pooling: Pooling,
    presentation: Presentation,
    strength: float = 1.0,
) -> list[Row]:
    """Score every split, raw, centred and whitened.

    Centring and whitening are fitted on the training words, ``vectors[0]``: on the base model's
    vectors for ``before``, on the adapted model's for ``after``; never on the control words.
    """
    rows = []
    for score, space in _SCORES.items():
        maps = [
            fit_space(space, *distinct_sides(vectors[0].split, stage))
            for stage in (vectors[0].before, vectors[0].after)
        ]
        for v in vectors:
            stages = (v.before.double().chunk(2), v.after.double().chunk(2))
            before, after = (
                measure_alignment(fitted.source(s), fitted.target(t), *v.split.groups)
                for fitted, (s, t) in zip(maps, stages, strict=True)
            )
            name = v.split.name
            rows.append(Row(layer, pooling, presentation, score, name, strength, before, after))
    return rows


def distinct_sides(split: Split, stage: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors of the distinct words on either side of a split."""
    first, second = (
        distinct(side, torch.tensor(groups, device=side.device))
        for side, groups in zip(stage.chunk(2), split.groups, strict=True)
    )
    return first, second


def layer_curve(vectors: dict[int, Vectors]) -> dict[int, tuple[Alignment, Alignment]]:
    """Raw alignment before and after, at every layer that was encoded."""
    curve = {}
    for layer, v in vectors.items():
        stages = (v.before.chunk(2), v.after.chunk(2))
        before, after = (measure_alignment(s, t, *v.split.groups) for s, t in stages)
        curve[layer] = (before, after)
    return curve


def mismatched_cosines(vectors: Tensor, split: Split, shifts: int = 8) -> Tensor:
    """Cosines of some mismatched pairs, for a histogram: each source with later pairs' targets."""
    source, target = (torch.nn.functional.normalize(v.double()) for v in vectors.chunk(2))
    groups = [torch.tensor(g, device=vectors.device) for g in split.groups]
    cosines = []
    for shift in range(1, min(shifts, len(source) - 1) + 1):
        differ = (groups[0] != groups[0].roll(-shift)) & (groups[1] != groups[1].roll(-shift))
        cosines.append((source * target.roll(-shift, 0)).sum(1)[differ])
    return torch.cat(cosines) if cosines else vectors.new_empty(0)
