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


def summary_card(config: RunConfig, files: ModelFiles, parameters: int, notes: list[str]) -> str:
    """Text of the model card of fine-tuning on summaries.

    Args:
        config: The run.
        files: The base model.
        parameters: Numbers that were trained.
        notes: Warnings of the run.
    """
    adapter = config.method == "lora"
    what = f"LoRA on blocks {config.lora.layers}" if adapter else "all weights"
    beside = " and, jointly, to align word pairs" if config.objective == "joint" else ""
    warnings = "".join(f"\n> **{note}**\n" for note in notes)
    library = "peft" if adapter else "transformers"
    return f"""---
base_model: {files.hub_id}
library_name: {library}
tags: [summarization, tli-engine]
---

# {"LoRA adapter" if adapter else "Model"} fine-tuned on summaries
{warnings}
Trained with tli-engine {__version__} to write the {config.data.columns[1]} of an article
({config.data.texts}){beside}: {what}, {parameters:,} parameters. The prompt is

```
{config.prompt.instruction}
```

({config.prompt.template} template). Its loss on unseen articles stands in the run's
`evaluation.json`; what it writes was not measured here. The articles have a licence of their own.
"""
