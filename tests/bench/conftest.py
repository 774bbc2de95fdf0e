"""Tiny subjects for the benches of whole models."""

from collections.abc import Callable

import pytest
import torch

from bench.models import Subject, random_subject
from tli_engine.testing import tiny_config


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For all tests here."""


@pytest.fixture
def tiny_subject() -> Callable[..., Subject]:
    """Random weights in four blocks of width 64; fp32, so that only the order of sums differs."""

    def make(family: str = "llama", *, nf4: bool = False, name: str = "tiny") -> Subject:
        config = tiny_config(family, hidden_size=64, intermediate_size=128)
        return random_subject(name, config, torch.float32, torch.device("cpu"), nf4)

    return make
