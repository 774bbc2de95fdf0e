"""A tiny model, and figures of layers made up to order."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tli_engine.align.retrieval import Alignment, Direction
from tli_engine.models.early import EarlyModel, load_early
from tli_engine.models.files import ModelFiles, open_model
from tli_engine.testing import save_tiny_model


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For all tests here."""


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return open_model(str(save_tiny_model(tmp_path_factory.mktemp("llama"), "llama")))


@pytest.fixture
def model(files: ModelFiles) -> EarlyModel:
    """The first three blocks of a tiny llama of four."""
    return load_early(files, 3, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture
def measured() -> Callable[..., Alignment]:
    """An alignment of given ranks and cosines."""

    def direction(ranks: Tensor) -> Direction:
        reciprocal = 1 / ranks.double()
        hits = ranks == 1
        p_at_1 = float(hits.double().mean())
        return Direction(p_at_1, float(reciprocal.mean()), p_at_1, reciprocal, hits, len(ranks))

    def alignment(
        forward: Tensor, reverse: Tensor, true: float = 0.5, random: float = 0.1
    ) -> Alignment:
        cosines = torch.full((len(forward),), true, dtype=torch.float64)
        return Alignment(cosines, random, direction(forward), direction(reverse))

    return alignment
