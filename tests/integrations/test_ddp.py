"""Accelerated models in ``DistributedDataParallel``: gradients are those of the model alone."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tests.integrations.conftest import adapt, assert_close, gradients
from tli_engine import accelerate

Load = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def _one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # torch puts the rank before every later traceback
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("read", ["state", "loss"])
@pytest.mark.parametrize("unused", [False, True], ids=["all used", "unused found"])
def test_gradients_in_ddp(load: Load, tokens: dict[str, Tensor], read: str, unused: bool) -> None:
    def steps(model: Any, wrapped: Any) -> list[dict[str, Tensor]]:
        found = []
        for _ in range(2):
            out = wrapped(**tokens, output_hidden_states=True, labels=tokens["input_ids"])
            loss = out.loss if read == "loss" else out.hidden_states[2].square().mean()
            loss.backward()
            found.append(gradients(model))
        return found

    # blocks whose adapters get no gradient would be an error of the second step, as they are without us
    layers = list(range(2)) if read == "state" and not unused else None
    model = adapt(load(), layers_to_transform=layers)
    expected = steps(model, model)
    accelerate(model)
    actual = steps(model, DistributedDataParallel(model, find_unused_parameters=unused))
    for mine, theirs in zip(actual, expected, strict=True):
        for name, gradient in theirs.items():
            assert_close(mine[name], gradient, 1e-4)


def test_two_processes(folder: Callable[..., Path], tmp_path: Path) -> None:
    """As in ``ddp_on_ranks.py``: plain, with parameters that are not used, with checkpointing."""
    program = [sys.executable, "-m", "tests.integrations.ddp_on_ranks"]
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # what is split off has no GPU
    own["CUDA_VISIBLE_DEVICES"] = ""
    ended = subprocess.run(
        [*program, str(folder()), str(tmp_path / "store")],
        env=os.environ | own,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
