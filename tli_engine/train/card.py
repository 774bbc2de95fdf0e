"""The model card of an adapter."""

from tli_engine import __version__
from tli_engine.config import RunConfig
from tli_engine.models.files import ModelFiles


def model_card(config: RunConfig, files: ModelFiles, warnings: list[str]) -> str:
    """Text of ``adapter/README.md``, with the YAML header that the Hub reads."""
    align, lora = config.align, config.lora
    notes = "".join(f"\n> **{warning}**\n" for warning in warnings)
    return f"""---
base_model: {files.hub_id}
library_name: peft
tags: [lora, tli-engine]
---

# LoRA adapter trained by Targeted Lexical Injection
{notes}
Trained with tli-engine {__version__} on word pairs in {" and ".join(config.data.languages)}
({config.data.pairs}): {align.loss} loss in {align.space} space on `hidden_states[{align.layer}]`,
{align.pooling} pooling, words presented {config.words.presentation}. Adapts
{", ".join(lora.modules)} of blocks {lora.layers}; r = {lora.r}, alpha = {lora.alpha:g}.

What it did to alignment, on pairs it was trained on and on pairs it never saw, beside random
pairs, is in the run's `evaluation.json`. It was not trained for, nor measured on, any other task.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{files.hub_id}")
model = PeftModel.from_pretrained(base, "adapter")
```
"""
