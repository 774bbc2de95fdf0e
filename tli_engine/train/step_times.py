"""Times of training steps that were measured; the rows are the committed ones of ``bench/results``."""

from dataclasses import dataclass
from typing import Any

import torch

from tli_engine.train.plan_outline import Outline

# hidden size, feed-forward size, blocks, query heads, key heads, vocabulary
_SHAPES = {
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128256),
    "qwen2-72b": (8192, 29568, 80, 64, 8, 152064),
    "qwen2-1.5b": (1536, 8960, 28, 12, 2, 151936),
}
# blocks with adapters, and what the bench calls that
_BLOCKS = {"0-2": "lora_early", "all": "lora_all"}
_ALL = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@dataclass(frozen=True)
class Measured:
    """A step as it was measured.

    Attributes:
        results: The device's name in ``bench/results``.
        model: A shape.
        case: ``step`` of ``tli_step.json``: hidden_states[2], adapters of rank 16 on q and v of blocks
            0-1; ``lora_early`` and ``lora_all`` of ``train_step.json``: of rank 16 on all projections of
            blocks 0-2, or of all, weights in NF4; ``full``: every weight, in bf16, with fp32 master
            weights. Nothing is run again.
        tokens: Of a batch.
        numerics: Of the products.
        ms: Of a step, the median.
    """

    results: str
    model: str
    case: str
    tokens: int
    numerics: str
    ms: float


_H100, _H200 = "NVIDIA-H100-80GB-HBM3", "NVIDIA-H200"
MEASURED = [
    Measured(_H100, "llama-3-8b", "step", 64, "exact", 0.66),
    Measured(_H100, "llama-3-8b", "step", 64, "fast", 0.61),
    Measured(_H100, "llama-3-8b", "step", 256, "exact", 1.63),
    Measured(_H100, "llama-3-8b", "step", 256, "fast", 1.49),
    Measured(_H100, "llama-3-8b", "step", 4125, "exact", 14.06),
    Measured(_H100, "llama-3-8b", "step", 4125, "fast", 13.91),
    Measured(_H100, "qwen2-72b", "step", 64, "exact", 1.65),
    Measured(_H100, "qwen2-72b", "step", 64, "fast", 1.5),
    Measured(_H100, "qwen2-72b", "step", 256, "exact", 4.68),
    Measured(_H100, "qwen2-72b", "step", 256, "fast", 4.23),
    Measured(_H100, "llama-3-8b", "lora_early", 8192, "exact", 460.58),
    Measured(_H100, "llama-3-8b", "lora_all", 8192, "exact", 501.57),
    Measured(_H200, "llama-3-8b", "step", 64, "exact", 0.64),
    Measured(_H200, "llama-3-8b", "step", 64, "fast", 0.59),
    Measured(_H200, "llama-3-8b", "step", 256, "exact", 1.27),
    Measured(_H200, "llama-3-8b", "step", 256, "fast", 1.18),
    Measured(_H200, "llama-3-8b", "step", 4125, "exact", 13.33),
    Measured(_H200, "llama-3-8b", "step", 4125, "fast", 13.24),
    Measured(_H200, "qwen2-72b", "step", 64, "exact", 1.69),
    Measured(_H200, "qwen2-72b", "step", 64, "fast", 1.49),
    Measured(_H200, "qwen2-72b", "step", 256, "exact", 4.63),
    Measured(_H200, "qwen2-72b", "step", 256, "fast", 4.16),
    Measured(_H200, "llama-3-8b", "lora_early", 8192, "exact", 449.53),
    Measured(_H200, "llama-3-8b", "lora_all", 8192, "exact", 468.93),
    Measured(_H200, "qwen2-1.5b", "lora_early", 8192, "exact", 104),
    Measured(_H200, "qwen2-1.5b", "full", 8192, "exact", 153.22),
    Measured(_H200, "qwen2-72b", "lora_early", 4096, "exact", 1979.67),
]
# share by which a batch may differ from the one measured
_NEAR = 0.05


def measured_seconds(outline: Outline, tokens: int, recomputed: int) -> float | None:
    """Seconds of a step of this run, if one like it was measured: same shape, adapters and tokens."""
    run = outline.run
    if recomputed or not _alike(outline):
        return None
    case = _case(outline)
    shape = _shape(outline.config)
    rows = (
        row
        for row in MEASURED
        if (row.results, row.case, row.numerics) == (outline.target.results, case, run.numerics)
        and _SHAPES[row.model] == shape
        and abs(tokens - row.tokens) <= _NEAR * row.tokens
    )
    found = next(rows, None)
    return None if found is None else found.ms / 1000


def _alike(outline: Outline) -> bool:
    """Whether all but shape, adapters' places and tokens is as it was measured."""
    run, lora, train = outline.run, outline.run.lora, outline.run.train
    full = run.method == "full"
    weights = outline.nf4 != full and outline.fused and outline.dtype == torch.bfloat16
    # an adapter that is gone on from may be of another rank, on other layers
    trained = (
        train.rounding == "master" if full else (lora.r, lora.dropout, lora.init) == (16, 0, None)
    )
    at_once = (train.accumulate, train.in_backward, train.chunk_tokens) == (1, False, None)
    usual = (train.optimizer, train.cuda_graph, run.weight_residency) == ("adamw", "auto", "nf4")
    return weights and trained and at_once and usual and outline.gpus == 1


def _case(outline: Outline) -> str | None:
    run = outline.run
    modules, layers = set(run.lora.modules), outline.run.lora.layers
    if run.objective == "align":
        alike = modules == {"q_proj", "v_proj"} and layers == "0-1" and outline.early.depth == 2
        return "step" if alike and run.align.space == "raw" else None
    alike = run.objective == "sft" and run.sft.attention in ("auto", "varlen")
    # attention took rows of one length
    if not alike or run.sft.context != 2048:
        return None
    if run.method == "full":
        return "full"
    return _BLOCKS.get(layers) if modules == _ALL else None


def _shape(config: Any) -> tuple[int, ...]:
    return (
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.vocab_size,
    )
