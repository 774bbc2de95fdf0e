"""Steps launched before the figures of the one before are read: the same bits, and none lost."""

from typing import Any

import pytest
import torch

from tests.fine_tuning import config_of, trainer_of
from tli_engine.config import RunConfig
from tli_engine.errors import TrainingError
from tli_engine.models.files import ModelFiles, open_model
from tli_engine.testing import save_tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return open_model(str(save_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama")))


@pytest.mark.parametrize(
    "config",
    [
        config_of(lora={"dropout": 0.3}, train={"accumulate": 2, "max_grad_norm": 0.1}),
        config_of("full"),
    ],
    ids=["lora", "full"],
)
def test_steps_launched_ahead_give_the_bits_of_those_launched_in_turn(
    files: ModelFiles, config: RunConfig
) -> None:
    plain, expected = trainer_of(files, config, validate=True)
    ahead, found = trainer_of(files, config, validate=True)
    # on a CPU nothing is gained
    assert not ahead.engine.runs_ahead
    ahead.engine.runs_ahead = True
    plain.run()
    ahead.run()
    assert [(s.loss, s.grad_norm, s.figures) for s in found] == [
        (s.loss, s.grad_norm, s.figures) for s in expected
    ]
    for name, tensor in plain.engine.tensors.items():
        assert torch.equal(ahead.engine.tensors[name], tensor), name
        assert ahead.engine.tensors[name].grad is None


def test_no_memory_for_the_step_launched_ahead_loses_none(
    files: ModelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, steps = trainer_of(files, config_of())
    trainer.engine.runs_ahead, launch = True, trainer.engine._launch

    def launched(step: int) -> Any:
        found = launch(step)
        if step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return found

    monkeypatch.setattr(trainer.engine, "_launch", launched)
    with pytest.raises(TrainingError, match="out of memory"):
        trainer.run()
    assert [s.step for s in steps] == [1, 2, 3]


def test_nothing_is_launched_ahead_of_what_is_timed_by_itself(files: ModelFiles) -> None:
    """A GPU would work on the next step while an article is measured, and nobody count it."""
    config = config_of(train={"checkpoint_steps": 3})
    trainer, _ = trainer_of(files, config, validate=True)
    trainer.engine.runs_ahead = True
    ahead: list[int] = []
    trainer.on_step = lambda step: ahead.append(step.step) if trainer.engine._ahead else None
    trainer.run()
    # every second is measured, the third is written, and the sixth is the last
    assert ahead == [1, 5]
