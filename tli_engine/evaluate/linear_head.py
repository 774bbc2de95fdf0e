"""The baseline to beat: the frozen model with a linear head per language."""

import torch
from torch import Tensor

from tli_engine.align.losses import alignment_loss
from tli_engine.align.objective import negatives
from tli_engine.align.retrieval import measure_alignment
from tli_engine.align.space import PairSpace, fit_space
from tli_engine.config import AlignConfig, Pooling, Presentation
from tli_engine.evaluate.alignment import Row, Vectors, distinct_sides
from tli_engine.ops import cosine_similarity

_STEPS = 150
_LEARNING_RATE = 2e-3
_WEIGHT_DECAY = 0.1
_BATCH = 256
# a narrow head fits in seconds, and memorises less
_MAX_DIM = 256
_OBJECTIVE = AlignConfig(loss="infonce", temperature=0.05, two_way=True, mask_duplicates=True)


def linear_head_rows(
    vectors: list[Vectors], layer: int, pooling: Pooling, presentation: Presentation
) -> list[Row]:
    """Fit a linear map per language to the frozen model's vectors, and measure it.

    The maps start from one random projection of the whitened vectors, the same for both
    languages, and are trained by symmetric InfoNCE on the training pairs, ``vectors[0]``, for 150
    steps of AdamW. ``before`` is the frozen model's raw cosine, ``after`` that of the mapped
    vectors.
    """
    train = vectors[0]
    space = fit_space("whitened", *distinct_sides(train.split, train.before))
    heads = _fit_heads(space, train)
    rows = []
    for v in vectors:
        source, target = v.before.chunk(2)
        mapped = space.source(source.double()) @ heads[0], space.target(target.double()) @ heads[1]
        before = measure_alignment(source, target, *v.split.groups)
        after = measure_alignment(*mapped, *v.split.groups)
        rows.append(Row(layer, pooling, presentation, "cosine", v.split.name, 1.0, before, after))
    return rows


def _fit_heads(space: PairSpace, train: Vectors) -> tuple[Tensor, Tensor]:
    source, target = train.before.chunk(2)
    sides = space.source(source.double()).float(), space.target(target.double()).float()
    width = source.shape[1]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(width, min(width, _MAX_DIM), generator=generator)
    start = torch.linalg.qr(start).Q.to(source.device)
    heads = [start.clone().requires_grad_(), start.clone().requires_grad_()]
    optimizer = torch.optim.AdamW(heads, lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    groups = torch.tensor(train.split.groups)
    with torch.enable_grad():
        for _ in range(_STEPS):
            rows = torch.randperm(len(source), generator=generator)[:_BATCH]
            is_negative = negatives(groups[:, rows], mask_duplicates=True).to(source.device)
            rows = rows.to(source.device)
            cosine = cosine_similarity(sides[0][rows] @ heads[0], sides[1][rows] @ heads[1])
            optimizer.zero_grad()
            torch.autograd.backward(alignment_loss(cosine, is_negative, _OBJECTIVE))
            optimizer.step()
    return heads[0].detach().double(), heads[1].detach().double()
