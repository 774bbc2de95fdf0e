"""The layer scan of a model of Llama-3-8B's shape on a GPU, against its forward pass.

The baseline runs the same packs through the same blocks and does nothing else; the floor is the
time of the blocks' matrix products at the measured rate. Weights are random: they change no time.
The scan is timed with and without the bootstrap, on the CPU, that proposes a layer.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import LlamaConfig

from bench.harness import Row, interleave, matmul_rate, print_rows, quantiles_ms, write_results
from tli_engine.align.encode import Staged, stage
from tli_engine.align.layers import vectors_by_layer
from tli_engine.align.pairing import Pairing
from tli_engine.align.retrieval import read
from tli_engine.align.scan import scan
from tli_engine.data.pairs import PairList
from tli_engine.data.words import Word
from tli_engine.models.early import EarlyModel
from tli_engine.testing import random_words

_LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
}
# tokens of the longest word, its first one not counted: 4.5 a word with it
_LONGEST = 6


def random_model(layers: int, device: torch.device) -> EarlyModel:
    """A model of so many blocks, bf16, its weights as large as trained ones."""
    model = EarlyModel(LlamaConfig(num_hidden_layers=layers, **_LLAMA_3_8B), layers)
    for module in model.decoder.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = torch.ones(parameter.shape, device=device, dtype=torch.bfloat16)
            if value.ndim > 1:
                value.normal_(std=0.02)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    return model.to(device)


@torch.no_grad()
def forward(model: EarlyModel, staged: Staged) -> None:
    """All blocks on all packs."""
    for part in staged.packs:
        for _ in model.hidden_states(part.pack):
            pass


def waited_for(call: Callable[[], object]) -> Callable[[], None]:
    """The same, and the wait for the device."""

    def waiting() -> None:
        call()
        torch.cuda.synchronize()

    return waiting


def bench(model: EarlyModel, words: list[list[Word]], rounds: int) -> list[Row]:
    pairs, groups = len(words[0]), list(range(len(words[0])))
    staged = stage(model, [*words[0], *words[1]], ["content"])
    rows = [[staged.row_of[word] for word in side] for side in words]
    texts = [tuple(f"{side}{i}" for i in groups) for side in "ab"]
    pair_list = PairList(("a", "b"), texts[0], texts[1])
    compare = Pairing(groups, groups, model.device, *rows)

    def layers() -> None:
        figures = [compare.measure(v[0], v[0]) for _, v in vectors_by_layer(model, staged)]
        for of_layer in figures:
            read(of_layer)

    providers = {
        "forward": lambda: forward(model, staged),
        "scan, no proposal": layers,
        "scan": lambda: scan(model, "8b", pair_list, words[0], words[1], "content"),
    }
    times = interleave(
        {name: waited_for(call) for name, call in providers.items()},
        dict.fromkeys(providers, rounds),
    )
    linear = sum(p.numel() for p in model.blocks.parameters() if p.ndim > 1)
    floor = 2 * linear * staged.tokens / matmul_rate()
    shape = {"pairs": pairs, "tokens": staged.tokens, "layers": model.depth}
    baseline = quantiles_ms(times["forward"])[0]
    return [
        Row(
            "scan", shape, "llama-3-8b bf16", name, *quantiles_ms(seconds),
            ratio_to_baseline=baseline / quantiles_ms(seconds)[0],
            peak_mib=torch.cuda.max_memory_allocated() / 2**20,
            roofline=floor / statistics.median(seconds),
            notes={"packs": len(staged.packs)},
        )
        for name, seconds in times.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[623, 5000])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--many", type=int, help="scan so many pairs once, and print its time")
    args = parser.parse_args()
    model = random_model(args.layers, torch.device("cuda"))
    rows = []
    for pairs in args.pairs:
        words = [random_words(pairs, _LONGEST, seed=seed) for seed in (1, 2)]
        rows += bench(model, words, args.rounds)
    print_rows(rows)
    print(f"written: {write_results('scan', rows, [])}")
    if args.many:
        words = [random_words(args.many, _LONGEST, seed=seed) for seed in (1, 2)]
        texts = [tuple(f"{side}{i}" for i in range(args.many)) for side in "ab"]
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        scan(model, "8b", PairList(("a", "b"), texts[0], texts[1]), *words, "content", say=print)
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(f"{args.many} pairs: {seconds:.1f} s, {peak:.1f} GiB at the peak")


if __name__ == "__main__":
    main()
