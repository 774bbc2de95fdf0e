"""Fixtures with SmolLM2's real weights, fetched once into the cache."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tli_engine.config import WordsConfig
from tli_engine.data.pairs import read_pairs
from tli_engine.data.words import WordTokenizer
from tli_engine.models.files import ModelFiles, open_model


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def smollm2() -> ModelFiles:
    return open_model("builtin:smollm2-135m")


@pytest.fixture(scope="session")
def full_model(smollm2: ModelFiles) -> Any:
    """transformers' own model, whole, fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2.folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def tokenize(smollm2: ModelFiles) -> WordTokenizer:
    return WordTokenizer(smollm2.tokenizer, WordsConfig())


@pytest.fixture(scope="session")
def lexicon() -> Any:
    return read_pairs("builtin:sw-en", ("swahili", "english"), "train")
