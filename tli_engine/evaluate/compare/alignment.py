"""Alignment of word pairs before and after a run: at its layer, and on unseen pairs at every layer."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tli_engine.align.encode import encode
from tli_engine.config import RunConfig
from tli_engine.data.splits import Split
from tli_engine.evaluate.alignment import Vectors, alignment_rows, layer_curve
from tli_engine.evaluate.linear_head import linear_head_rows
from tli_engine.models.early import EarlyModel


def encode_splits(
    model: EarlyModel,
    splits: Sequence[Split],
    config: RunConfig,
    advance: Callable[[int], None] = lambda words: None,
) -> list[dict[int, Tensor]]:
    """Vectors of every split by layer: the last one's at all layers, the others' at ``align.layer``."""
    found = []
    for split in splits:
        layers = range(model.depth + 1) if split is splits[-1] else [config.align.layer]
        vectors = encode(model, split.words, layers, config.align.pooling, advance)
        # of full fine-tuning the other stage's model is yet to come
        found.append({k: v.cpu() for k, v in zip(layers, vectors, strict=True)})
    return found


def alignment_figures(
    splits: Sequence[Split],
    before: Sequence[dict[int, Tensor]],
    after: Sequence[dict[int, Tensor]],
    config: RunConfig,
    device: torch.device,
) -> dict[str, Any]:
    """What a run did: rows as in ``evaluation.json``, and the curve over the layers, for JSON.

    ``linear_head`` is the baseline, rows of the frozen model and of a linear map of its vectors.

    Args:
        splits: Word pairs.
        before: Vectors of each split by layer, as :func:`encode_splits` gives them.
        after: Likewise.
        config: The run.
        device: Where vectors are compared.
    """
    layer = config.align.layer
    vectors = [
        Vectors(s, b[layer].to(device), a[layer].to(device))
        for s, b, a in zip(splits, before, after, strict=True)
    ]
    shown = config.align.pooling, config.words.presentation
    rows = alignment_rows(vectors, layer, *shown)
    heads = linear_head_rows(vectors, layer, *shown)
    last = {
        k: Vectors(splits[-1], b.to(device), after[-1][k].to(device)) for k, b in before[-1].items()
    }
    curve = [
        {
            "layer": k,
            **{
                stage: {
                    "separation": a.separation,
                    "mrr": float(a.two_way_reciprocal_ranks.mean()),
                }
                for stage, a in zip(("before", "after"), both, strict=True)
            },
        }
        for k, both in layer_curve(last).items()
    ]
    return {
        "rows": [row.to_json() for row in rows],
        "linear_head": [row.to_json() for row in heads],
        "split": splits[-1].name,
        "pairs": len(splits[-1].source),
        "layers": curve,
    }
