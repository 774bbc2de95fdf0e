"""A loss of sentence-transformers on one early hidden state of an accelerated model.

``python docs/examples/sentence_transformers_loss.py`` trains a tiny Llama of random weights, with and without,
and prints seconds; ``… MODEL OUT_FOLDER`` trains another model.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.losses import MultipleNegativesRankingLoss
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import tli_engine
from tli_engine.testing import save_tiny_model

PAIRS = [
    ("maji", "water"), ("moto", "fire"), ("mti", "tree"), ("jua", "sun"), ("mwezi", "moon"),
    ("mkono", "hand"), ("jicho", "eye"), ("ndege", "bird"), ("samaki", "fish"), ("mbwa", "dog"),
    ("nyumba", "house"), ("barabara", "road"), ("kitabu", "book"), ("chumvi", "salt"),
    ("maziwa", "milk"), ("mkate", "bread"),
]  # fmt: skip


@dataclass
class Result:
    """What a training gave."""

    losses: list[float]
    weights: dict[str, Tensor]
    summary: str
    seconds: float


class EarlyState(nn.Module):
    """The first module of a SentenceTransformer: mean of one hidden state over a text's tokens."""

    def __init__(self, model: Any, tokenizer: Any, layer: int) -> None:
        super().__init__()
        self.model, self.tokenizer, self.layer = model, tokenizer, layer

    def tokenize(self, texts: list[str], **kwargs: Any) -> dict[str, Tensor]:
        """Token ids and mask of texts."""
        return dict(self.tokenizer(texts, return_tensors="pt", padding=True))

    preprocess = tokenize

    def forward(self, features: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        """Add ``sentence_embedding``, ``[B, D]``."""
        mask = features["attention_mask"]
        out = self.model(
            input_ids=features["input_ids"], attention_mask=mask, output_hidden_states=True
        )
        weight = mask[..., None]
        pooled = (out.hidden_states[self.layer] * weight).sum(1) / weight.sum(1)
        return features | {"sentence_embedding": pooled}


def train(model_name: str, out: Path, *, steps: int, accelerated: bool) -> Result:
    """Train LoRA for some steps on the CPU."""
    torch.manual_seed(0)
    model = AutoModel.from_pretrained(model_name, dtype=torch.float32)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    model = get_peft_model(model, lora)
    summary = str(tli_engine.accelerate(model)) if accelerated else ""
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    sentences = SentenceTransformer(modules=[EarlyState(model, tokenizer, 2)], device="cpu")
    source, target = zip(*PAIRS, strict=True)
    trainer = SentenceTransformerTrainer(
        sentences,
        SentenceTransformerTrainingArguments(
            output_dir=str(out), max_steps=steps, per_device_train_batch_size=8,
            learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
            disable_tqdm=True, seed=0,
        ),
        train_dataset=Dataset.from_dict({"anchor": list(source), "positive": list(target)}),
        loss=MultipleNegativesRankingLoss(sentences),
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
