"""Targeted Lexical Injection: align two languages in the early layers of an LLM, and measure it."""

import importlib
from typing import Any

__version__ = "0.1.0"

# imported on first use, so that ``tli-engine --help`` does not wait for torch
_PUBLIC = {
    "accelerate": "tli_engine.integrations.accelerate",
    "cosine_similarity": "tli_engine.ops",
    "nf4_dequantize": "tli_engine.ops",
    "nf4_linear": "tli_engine.ops",
    "nf4_lora_linear": "tli_engine.ops",
    "nf4_quantize": "tli_engine.ops",
    "restore": "tli_engine.integrations.accelerate",
    "segment_mean": "tli_engine.ops",
}
__all__ = [
    "accelerate",
    "cosine_similarity",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_lora_linear",
    "nf4_quantize",
    "restore",
    "segment_mean",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'tli_engine' has no attribute {name!r}")
