"""Tiny models of every family, written once, and transformers' own view of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tli_engine.config import LoraConfig
from tli_engine.data.words import Pack, Word, pack
from tli_engine.models.adapters import adapter_tensors, add_lora
from tli_engine.models.causal import CausalModel, load_causal
from tli_engine.models.early import EarlyModel, load_early
from tli_engine.models.files import ModelFiles, open_model
from tli_engine.testing import save_tiny_model

Tiny = Callable[..., ModelFiles]


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For all tests here."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Open a tiny model by family and configuration; not to be written to."""
    made: dict[str, ModelFiles] = {}

    def find(family: str, **overrides: Any) -> ModelFiles:
        key = f"{family} {sorted(overrides.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            made[key] = open_model(str(save_tiny_model(folder, family, **overrides)))
        return made[key]

    return find


@pytest.fixture
def early(tiny: Tiny) -> Callable[..., EarlyModel]:
    """Load the first blocks of a tiny model, fp32 on the CPU."""

    def load(family: str = "llama", depth: int = 2, **overrides: Any) -> EarlyModel:
        files = tiny(family, **overrides)
        return load_early(files, depth, dtype=torch.float32, device=torch.device("cpu"))

    return load


@pytest.fixture(scope="session")
def full(tiny: Tiny) -> Callable[..., Any]:
    """transformers' own model, whole, fp32, new at each call."""
    from transformers import AutoModelForCausalLM

    def load(family: str = "llama", dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
        folder = tiny(family, **overrides).folder
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    return load


@pytest.fixture
def causal(tiny: Tiny) -> Callable[..., CausalModel]:
    """Load a tiny model whole, fp32 on the CPU, with adapters whose B is not zero if asked for."""

    def load(family: str, lora: LoraConfig | None = None, **overrides: Any) -> CausalModel:
        files = tiny(family, **overrides)
        model = load_causal(files, dtype=torch.float32, device=torch.device("cpu"))
        if lora is not None:
            add_lora(model.early, lora, model.early.depth, seed=0)
            generator = torch.Generator().manual_seed(1)
            for name, tensor in adapter_tensors(model.early).items():
                if ".lora_B." in name:
                    tensor.data.normal_(0, 0.05, generator=generator)
        return model

    return load


@dataclass(frozen=True)
class Texts:
    """Documents in a pack; from each one's prompt on, its tokens are predicted."""

    words: Pack
    predicting: Tensor
    targets: Tensor
    documents: list[tuple[list[int], int]]

    @classmethod
    def of(cls, documents: list[tuple[list[int], int]]) -> "Texts":
        """Pack documents, each with the length of its prompt."""
        words = [Word(tuple(ids), (True,) * len(ids)) for ids, _ in documents]
        predicting: list[int] = []
        targets: list[int] = []
        first = 0
        for ids, prompt in documents:
            predicting += range(first + prompt - 1, first + len(ids) - 1)
            targets += ids[prompt:]
            first += len(ids)
        indices = (torch.tensor(x, dtype=torch.int64) for x in (predicting, targets))
        return cls(pack(words), *indices, documents)


@pytest.fixture(scope="session")
def texts() -> Callable[..., Texts]:
    """Random documents of given lengths, half of each a prompt."""

    def make(*lengths: int, seed: int = 0) -> Texts:
        generator = torch.Generator().manual_seed(seed)
        documents = []
        for length in lengths:
            ids = torch.randint(0, 256, (length,), generator=generator).tolist()
            documents.append((ids, length // 2))
        return Texts.of(documents)

    return make
