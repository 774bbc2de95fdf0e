"""Hugging Face's Trainer on an accelerated model: LoRA, and a loss on one early hidden state.

``python docs/examples/trainer.py`` trains a tiny Llama of random weights, with and without,
and prints seconds; ``… MODEL OUT_FOLDER`` trains another model.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import tli_engine
from tli_engine.testing import save_tiny_model

PAIRS = [
    ("maji", "water"), ("moto", "fire"), ("mti", "tree"), ("jua", "sun"), ("mwezi", "moon"),
    ("mkono", "hand"), ("jicho", "eye"), ("ndege", "bird"), ("samaki", "fish"), ("mbwa", "dog"),
    ("nyumba", "house"), ("barabara", "road"), ("kitabu", "book"), ("chumvi", "salt"),
    ("maziwa", "milk"), ("mkate", "bread"),
]  # fmt: skip
LAYER = 2


@dataclass
class Result:
    """What a training gave."""

    losses: list[float]
    weights: dict[str, Tensor]
    summary: str
    seconds: float


class AlignmentTrainer(Trainer):
    """Draws the two words of each pair together at an early layer."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """InfoNCE over the batch, between last tokens' hidden states."""
        sides = []
        for side in ("source", "target"):
            ids, mask = inputs[f"{side}_ids"], inputs[f"{side}_mask"]
            out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
            last = out.hidden_states[LAYER][torch.arange(len(ids)), mask.sum(1) - 1]
            sides.append(torch.nn.functional.normalize(last, dim=-1))
        similarities = sides[0] @ sides[1].T / 0.1
        return torch.nn.functional.cross_entropy(similarities, torch.arange(len(similarities)))


def train(model_name: str, out: Path, *, steps: int, accelerated: bool) -> Result:
    """Train LoRA for some steps on the CPU."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    model = get_peft_model(model, lora)
    summary = str(tli_engine.accelerate(model)) if accelerated else ""

    def collate(pairs: list[tuple[str, str]]) -> dict[str, Tensor]:
        batch = {}
        for side, words in zip(("source", "target"), zip(*pairs, strict=True), strict=True):
            tokens = tokenizer(list(words), return_tensors="pt", padding=True)
            batch |= {f"{side}_ids": tokens["input_ids"], f"{side}_mask": tokens["attention_mask"]}
        return batch

    arguments = TrainingArguments(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False, seed=0,
    )  # fmt: skip
    trainer = AlignmentTrainer(model, arguments, data_collator=collate, train_dataset=PAIRS)
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
