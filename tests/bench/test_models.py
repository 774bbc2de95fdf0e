"""What the benches of whole models run on, and what they derive from it."""

from collections.abc import Callable

import pytest
import torch

from bench.engine import NF4_BYTES, step_floor
from bench.harness import covered_us, kernels_of
from bench.models import LONGEST, MEAN_LENGTH, PAIRS, SHORTEST, Subject, config_of
from bench.published import padded
from tli_engine.data.words import Word
from tli_engine.testing import tiny_config

Make = Callable[..., Subject]


def test_random_words_have_the_lengths_that_they_promise(tiny_subject: Make) -> None:
    splits = tiny_subject().splits
    assert {split.name: len(split.pairs) for split in splits} == PAIRS
    for split in splits:
        lengths = [len(word) for word in split.words]
        assert sum(lengths) == MEAN_LENGTH * len(lengths)
        assert (min(lengths), max(lengths)) == (SHORTEST, LONGEST)
        assert all(word.input_ids[0] == 256 for word in split.words)
        assert all(max(word.input_ids[1:]) < 256 for word in split.words)
        assert all(word.content == (False, *[True] * (len(word) - 1)) for word in split.words)


def test_random_weights_are_the_same_at_each_read_and_differ_by_name(tiny_subject: Make) -> None:
    source = tiny_subject(nf4=True).files.source
    names = [f"layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    first, again, other = (source.read_nf4(name) for name in (names[0], names[0], names[1]))
    assert first is not None
    assert again is not None
    assert other is not None
    assert torch.equal(first.packed, again.packed)
    assert not torch.equal(first.packed, other.packed)
    assert source.read_nf4("embed_tokens.weight") is None
    assert "layers.4.mlp.up_proj.weight" not in source


def test_padded_batch_is_a_tokenizers() -> None:
    tokens = padded([Word((5, 6), (True, True)), Word((7,), (True,))])
    assert tokens["input_ids"].tolist() == [[5, 6], [7, 0]]
    assert tokens["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_floor_of_the_8b_step() -> None:
    """Two blocks there, and back all but the first one's q, k and v; bytes below 74 tokens or so."""
    block = 4096 * (4096 + 1024 + 1024) + 4096 * 4096 + 3 * 4096 * 14336
    weights = 4 * block - 4096 * (4096 + 1024 + 1024)
    floor = step_floor(config_of("llama-3-8b"), tokens=64, layer=2)
    assert floor.bytes == round(weights * NF4_BYTES)
    assert floor.flops == 2 * 64 * weights
    assert floor.seconds(bandwidth=3e12, rate=1e30) == pytest.approx(floor.bytes / 3e12)
    assert floor.seconds(bandwidth=1e30, rate=7e14) == pytest.approx(floor.flops / 7e14)


def test_floor_follows_the_first_adapted_block() -> None:
    config = tiny_config("qwen3", head_dim=16)
    lower, upper = (step_floor(config, 8, 3, first_adapted=i) for i in (0, 2))
    # one block of width 32 with four heads of 16, two of keys and values
    block = 32 * (64 + 32 + 32) + 64 * 32 + 3 * 32 * 48
    assert lower.flops - upper.flops == 2 * 8 * 2 * block


def test_only_kernels_of_a_trace_count() -> None:
    events = [
        {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 10, "dur": 12.5},
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy HtoD", "dur": 3},
        {"ph": "X", "cat": "gpu_user_annotation", "name": "Optimizer.step", "dur": 40},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "dur": 5},
        {"ph": "M", "name": "process_name"},
        {"ph": "X", "cat": "kernel", "name": "adamw", "ts": 20.5, "dur": 4},
    ]
    kernels = kernels_of({"traceEvents": events})
    assert kernels == [(10.0, 22.5), (20.5, 24.5)]
    # two of 16.5 us are the overlap's
    assert covered_us(kernels) == 14.5
    assert covered_us([(5, 6), (0, 4), (1, 2)]) == 5
