"""Fine-tuning steps of the peers: transformers, PEFT, bitsandbytes and Liger, as lean as they go.

Norms, embeddings, output layer and adapters are in bf16, without autocast and without clipping: this
is faster and smaller than the peers' defaults (``prepare_model_for_kbit_training``: fp32 norms and
head, adapters in fp32 under autocast). The optimizer is torch's fused AdamW on those bf16 weights, or
bitsandbytes' in 8 bits.
"""

from itertools import count
from typing import Any

import torch
from torch import Tensor

from bench.models import Subject
from bench.train_cases import (
    ALPHA,
    LEARNING_RATE,
    MODULES,
    RANK,
    Absent,
    Case,
    Provider,
    Step,
    draw_adapters,
    optimizer_of,
)


def peer_step(subject: Subject, case: Case, provider: Provider, batches: list[Tensor]) -> Step:
    """A step of transformers' model."""
    model = subject.causal_lm()
    # there is nothing to generate
    model.config.use_cache = False
    if subject.nf4:
        mark_quantized(model)
    if provider.activations == "recompute":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    if provider.liger:
        apply_liger(model)
    if case.method == "full":
        model.requires_grad_(True)
    else:
        model = add_lora(model, case, model.dtype)
    optimizer = make_optimizer(model, optimizer_of(case, subject.name, provider))
    return training_step(model, optimizer, batches, accumulate=provider.accumulate)


def mark_quantized(model: Any) -> None:
    """Say of a model of bitsandbytes' layers what ``from_pretrained`` says of it."""
    from transformers import BitsAndBytesConfig

    model.is_quantized = True
    model.quantization_method = "bitsandbytes"
    model.config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def apply_liger(model: Any) -> None:
    """Liger's RMSNorm, RoPE, SwiGLU and fused linear cross-entropy, for the rest of the process."""
    try:
        from liger_kernel import transformers as liger
    except ImportError as error:
        raise Absent(f"liger-kernel is not there: {error}") from None
    getattr(liger, f"apply_liger_kernel_to_{model.config.model_type}")(model=model)


def add_lora(model: Any, case: Case, dtype: torch.dtype) -> Any:
    """PEFT's adapters, in ``dtype``."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules=list(MODULES),
        layers_to_transform=case.early,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, lora, autocast_adapter_dtype=False)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    draw_adapters(adapted.named_parameters())
    return adapted


def make_optimizer(model: Any, kind: str) -> torch.optim.Optimizer:
    """Of all that is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if kind == "adamw":
        fused = trained[0].device.type == "cuda"
        return torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=fused)
    from bitsandbytes import optim

    optimizer: torch.optim.Optimizer = optim.AdamW8bit(trained, lr=LEARNING_RATE)
    return optimizer


def training_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    batches: list[Tensor],
    autocast: bool = False,
    accumulate: int = 1,
) -> Step:
    """Steps on ``batches`` in turns: forward, backward of each of ``accumulate`` equal parts, update."""
    model.train()
    device, number = model.device, count()

    def call() -> Tensor:
        ids = batches[next(number) % len(batches)].to(device)
        parts = ids.chunk(accumulate)
        total = torch.zeros((), device=device)
        for part in parts:
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                # of equal parts, all of whose tokens are labels
                loss: Tensor = model(input_ids=part, labels=part).loss / len(parts)
            torch.autograd.backward(loss)
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return Step(call, sum(p.numel() for p in model.parameters() if p.requires_grad))
