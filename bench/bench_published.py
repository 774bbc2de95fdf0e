"""The scan and the training step against the published procedure, on the same CPU and model.

The published scan runs one word at a time through the whole model, once for every layer; its
training step runs two padded batches through all blocks and the LM head, with adapters on every
block, to read ``hidden_states[2]``. Both are written here with transformers and peft from that
description. The published scan is timed on a few pairs, whole, and scaled to all of them: it does
the same work for each pair.
"""

import argparse
from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import nn

from bench.harness import Row, interleave, print_rows, quantiles_ms, write_results
from tli_engine.align.scan import scan
from tli_engine.align.space import fit_space
from tli_engine.config import RunConfig, apply_overrides, read_recipe, resolve_config
from tli_engine.data.pairs import PairList
from tli_engine.data.splits import Split, read_run_pairs, tokenize_splits
from tli_engine.models.adapters import add_lora
from tli_engine.models.early import load_early
from tli_engine.models.files import ModelFiles, open_model
from tli_engine.train.loop import Trainer

CPU = torch.device("cpu")
PEERS = ["transformers", "peft"]


def published_scan(model: nn.Module, tokenizer: Any, pairs: PairList) -> list[float]:
    """Mean cosine of each layer, a forward of the whole model for every layer and word."""

    def embedding(word: str, layer: int) -> torch.Tensor:
        tokens = tokenizer(word, return_tensors="pt")
        return model(**tokens, output_hidden_states=True).hidden_states[layer].mean(1)

    means = []
    with torch.no_grad():
        for layer in range(model.config.num_hidden_layers):
            cosines = [
                nn.functional.cosine_similarity(embedding(s, layer), embedding(t, layer)).item()
                for s, t in zip(pairs.source, pairs.target, strict=True)
            ]
            means.append(sum(cosines) / len(cosines))
    return means


def published_step(model: nn.Module, tokenizer: Any, pairs: PairList) -> Callable[[], None]:
    """One step of the published training: two full forwards, backward, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    starts = count(step=8)

    def pooled(words: tuple[str, ...]) -> torch.Tensor:
        tokens = tokenizer(list(words), padding=True, return_tensors="pt")
        hidden = model(**tokens, output_hidden_states=True).hidden_states[2]
        mask = tokens["attention_mask"].unsqueeze(-1)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))

    def step() -> None:
        batch = pairs[slice(start := next(starts), start + 8)]
        optimizer.zero_grad()
        similarity = pooled(batch.source) @ pooled(batch.target).T
        hardest = similarity.clone().fill_diagonal_(-torch.inf).amax(1)
        torch.relu(0.4 + hardest - similarity.diagonal()).mean().backward()
        optimizer.step()

    return step


def engine_step(files: ModelFiles, config: RunConfig, split: Split) -> Callable[[], None]:
    """One step of the ``paper`` recipe."""
    model = load_early(files, config.align.layer, dtype=torch.float32, device=CPU)
    add_lora(model, config.lora, config.align.layer, config.seed)
    space = fit_space("raw", torch.empty(0), torch.empty(0))
    trainer = Trainer(model, config, split, space, lambda step: None, lambda warning: None)
    model.train()
    return trainer.one_step


def bench_step(files: ModelFiles, config: RunConfig, split: Split, rounds: int) -> list[Row]:
    """Time the training step at the published batch size."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=["q_proj", "v_proj"])
    base = AutoModelForCausalLM.from_pretrained(files.folder, dtype=torch.float32)
    peft_model = get_peft_model(base, lora).train()
    providers = {
        "published": published_step(peft_model, files.tokenizer, split.pairs),
        "tli-engine": engine_step(files, config, split),
    }
    times = interleave(providers, {"published": rounds, "tli-engine": 4 * rounds}, warm_up=2)
    return _rows("step", {"pairs": 8, "layer": 2}, times, {"published": 1, "tli-engine": 1})


def bench_scan(files: ModelFiles, split: Split, sample: int) -> list[Row]:
    """Time the scan of all pairs; the published one on ``sample`` pairs, scaled up."""
    from transformers import AutoModelForCausalLM

    full = AutoModelForCausalLM.from_pretrained(files.folder, dtype=torch.float32).eval()
    early = load_early(files, files.config.num_hidden_layers, dtype=torch.float32, device=CPU)
    providers = {
        "published": lambda: published_scan(full, files.tokenizer, split.pairs[:sample]),
        "tli-engine": lambda: scan(
            early, files.name, split.pairs, split.source, split.target, "paper"
        ),
    }
    times = interleave(providers, {"published": 2, "tli-engine": 2}, warm_up=0)
    scale = {"published": len(split.pairs) / sample, "tli-engine": 1.0}
    shape = {"pairs": len(split.pairs), "layers": early.depth}
    return _rows("scan", shape, times, scale)


def _rows(
    case: str, shape: dict[str, int], times: dict[str, list[float]], scale: dict[str, float]
) -> list[Row]:
    scaled = {name: [t * scale[name] for t in seconds] for name, seconds in times.items()}
    baseline = quantiles_ms(scaled["published"])[0]
    return [
        Row(
            case, shape, "smollm2-135m fp32", name, *quantiles_ms(seconds),
            ratio_to_baseline=baseline / quantiles_ms(seconds)[0],
            notes={"calls": len(seconds), "scaled_by": scale[name]},
        )
        for name, seconds in scaled.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sample", type=int, default=8, help="pairs of the published scan")
    parser.add_argument("--rounds", type=int, default=12, help="published steps to time")
    args = parser.parse_args()
    overrides = ["model=builtin:smollm2-135m", "quantize=none", "dtype=float32"]
    config = resolve_config(apply_overrides(read_recipe("paper"), overrides), "paper")
    files = open_model(config.model)
    split = tokenize_splits(read_run_pairs(config.data), files.tokenizer, config.words)[0]
    for op, rows in (
        ("tli_step", bench_step(files, config, split, args.rounds)),
        ("tli_scan", bench_scan(files, split, args.sample)),
    ):
        print_rows(rows)
        print(f"written: {write_results(op, rows, PEERS)}")


if __name__ == "__main__":
    main()
