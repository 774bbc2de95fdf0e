"""Differentiable, ``torch.compile``-able operators."""

from tli_engine.ops.add_rms_norm import add_rms_norm
from tli_engine.ops.cosine_similarity import cosine_similarity
from tli_engine.ops.dense_lora_linear import dense_lora_linear
from tli_engine.ops.nf4_dequantize import nf4_dequantize
from tli_engine.ops.nf4_linear import nf4_linear
from tli_engine.ops.nf4_lora_linear import nf4_lora_linear
from tli_engine.ops.nf4_quantize import nf4_quantize
from tli_engine.ops.pooled_alignment_loss import pooled_alignment_loss
from tli_engine.ops.rotary import rotary
from tli_engine.ops.segment_mean import segment_mean
from tli_engine.ops.swiglu import swiglu
from tli_engine.ops.word_attention import joined_word_attention, word_attention, word_bounds

__all__ = [
    "add_rms_norm",
    "cosine_similarity",
    "dense_lora_linear",
    "joined_word_attention",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_lora_linear",
    "nf4_quantize",
    "pooled_alignment_loss",
    "rotary",
    "segment_mean",
    "swiglu",
    "word_attention",
    "word_bounds",
]
