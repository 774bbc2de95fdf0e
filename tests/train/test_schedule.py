import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from tli_engine.config import TrainConfig
from tli_engine.train.schedule import learning_rate

THEIRS = {
    "linear": get_linear_schedule_with_warmup,
    "cosine": get_cosine_schedule_with_warmup,
    "constant": lambda optimizer, warmup, total: get_constant_schedule_with_warmup(
        optimizer, warmup
    ),
}


def theirs(schedule: str, rate: float, warmup: int, total: int) -> list[float]:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    scheduler = THEIRS[schedule](optimizer, warmup, total)
    rates = []
    for _ in range(total):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@settings(deadline=None, max_examples=30)
@given(
    schedule=st.sampled_from(sorted(THEIRS)),
    warmup=st.integers(0, 25),
    total=st.integers(1, 40),
    rate=st.floats(1e-6, 1e-1),
)
def test_equals_transformers(schedule: str, warmup: int, total: int, rate: float) -> None:
    config = TrainConfig(steps=total, schedule=schedule, warmup_steps=warmup, learning_rate=rate)
    ours = [learning_rate(config, step, total) for step in range(total)]
    assert ours == pytest.approx(theirs(schedule, rate, warmup, total), rel=1e-12, abs=1e-18)


def test_the_published_schedule() -> None:
    """50 steps of warm-up from zero to 2e-4, then straight down to zero at step 390."""
    config = TrainConfig(steps=390, schedule="linear", warmup_steps=50, learning_rate=2e-4)
    rates = [learning_rate(config, step, 390) for step in (0, 25, 50, 220, 389)]
    assert rates == pytest.approx([0, 1e-4, 2e-4, 1e-4, 2e-4 / 340])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_beyond_the_end_it_is_zero(schedule: str) -> None:
    config = TrainConfig(steps=10, schedule=schedule)
    assert learning_rate(config, 10, 10) == pytest.approx(0, abs=1e-20)
    assert learning_rate(config, 15, 10) == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize(("warmup", "decay", "total"), [(0, 5, 20), (4, 6, 30), (3, 7, 10)])
def test_warm_up_stable_decay_is_transformers(warmup: int, decay: int, total: int) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = get_wsd_schedule(
        optimizer, warmup, decay, num_training_steps=total, decay_type="linear"
    )
    config = TrainConfig(learning_rate=1e-3, schedule="wsd", warmup_steps=warmup, decay_steps=decay)
    for step in range(total):
        expected = scheduler.get_last_lr()[0]
        assert learning_rate(config, step, total) == pytest.approx(expected, rel=1e-9)
        optimizer.step()
        scheduler.step()
    assert learning_rate(config, total, total) == 0
