"""The model card of an adapter."""

from tli_engine import __version__
from tli_engine.config import RunConfig
from tli_engine.models.adapters import adapters
from tli_engine.models.early import EarlyModel
from tli_engine.models.files import ModelFiles


def model_card(
    model: EarlyModel, config: RunConfig, files: ModelFiles, *, unseen: bool, notes: list[str]
) -> str:
    """Text of ``adapter/README.md``, with the YAML header that the Hub reads.

    Args:
        model: With its adapters, which are described as they are.
        config: The run.
        files: The base model.
        unseen: Whether there were control pairs.
        notes: Warnings of the run.
    """
    align = config.align
    adapted = adapters(model)
    modules = sorted({name.rpartition(".")[2] for name in adapted})
    blocks = sorted({int(name.split(".")[1]) for name in adapted})
    some = next(iter(adapted.values()))
    warnings = "".join(f"\n> **{note}**\n" for note in notes)
    pairs = "on pairs it was trained on"
    pairs += " and on control pairs" if unseen else "; none were kept unseen"
    return f"""---
base_model: {files.hub_id}
library_name: peft
tags: [lora, tli-engine]
---

# LoRA adapter trained by Targeted Lexical Injection
{warnings}
Trained with tli-engine {__version__} on word pairs in {" and ".join(config.data.languages)}
({config.data.pairs}): {align.loss} loss in {align.space} space on `hidden_states[{align.layer}]`,
{align.pooling} pooling, words presented {config.words.presentation}. Adapts
{", ".join(modules)} of blocks {", ".join(map(str, blocks))}; r = {some.r}, alpha = {some.alpha:g}.

What it did to alignment, {pairs}, beside random pairs, is in the run's
`evaluation.json`. It was not trained for, nor measured on, any other task.

With `pip install peft`, and the folder of this file as ADAPTER:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{files.hub_id}")
model = PeftModel.from_pretrained(base, "ADAPTER")
```
"""
