"""TRL's SFTTrainer on an accelerated model: LoRA on texts, in 4 bits.

``python docs/examples/trl_sft.py MODEL OUT_FOLDER`` trains with and without, and prints seconds.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

import tli_engine

TEXTS = ["maji ni uhai", "moto ni mkali", "jua linawaka", "ndege anaruka", "samaki anaogelea"] * 4


@dataclass
class Result:
    """What a training gave."""

    losses: list[float]
    weights: dict[str, Tensor]
    summary: str
    seconds: float


def train(model_name: str, out: Path, *, steps: int, accelerated: bool) -> Result:
    """Train LoRA for some steps on the CPU."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        model_name,
        device_map={"": "cpu"},
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
    )
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)
    model = get_peft_model(model, lora)
    summary = str(tli_engine.accelerate(model)) if accelerated else ""
    trainer = SFTTrainer(
        model,
        SFTConfig(
            output_dir=str(out), max_steps=steps, per_device_train_batch_size=4,
            learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
            bf16=False, disable_tqdm=True, max_length=32, gradient_checkpointing=False, seed=0,
        ),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=AutoTokenizer.from_pretrained(model_name),
    )  # fmt: skip
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return Result(losses, weights, summary, seconds)


if __name__ == "__main__":
    for accelerated in (False, True):
        result = train(sys.argv[1], Path(sys.argv[2]), steps=30, accelerated=accelerated)
        print(f"accelerated: {accelerated}: {result.seconds:.2f} s, loss {result.losses[-1]:.5f}")
