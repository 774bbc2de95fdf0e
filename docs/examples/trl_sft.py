"""TRL's SFTTrainer on an accelerated model: LoRA on texts, in 4 bits.

``python docs/examples/trl_sft.py`` trains a tiny Llama of random weights, with and without,
and prints seconds; ``… MODEL OUT_FOLDER`` trains another model.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

import tli_engine
from tli_engine.testing import save_tiny_model

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


def main() -> None:
    """Train with and without, and print seconds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", help="a folder or Hub id; without: a tiny Llama")
    parser.add_argument("out", nargs="?", type=Path, help="the trainer's folder; without: not kept")
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    with TemporaryDirectory() as scratch:
        size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 32}
        model = args.model or str(save_tiny_model(Path(scratch) / "model", "llama", **size))
        out = args.out or Path(scratch) / "out"
        for accelerated in (False, True):
            result = train(model, out, steps=args.steps, accelerated=accelerated)
            seconds, loss = result.seconds, result.losses[-1]
            print(f"accelerated: {accelerated}: {seconds:.2f} s, loss {loss:.5f}")


if __name__ == "__main__":
    main()
