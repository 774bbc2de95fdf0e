"""Learning-rate schedules."""

import math

from tli_engine.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """Learning rate of a step, counted from 0: warm-up from zero, then the schedule."""
    if step < config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    if config.schedule == "linear":
        return config.learning_rate * max(0.0, 1 - progress)
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if config.schedule == "wsd":
        # warm-up, stable, decay
        left = (total - step) / (config.decay_steps or 1)
        return config.learning_rate * min(1.0, left)
    return config.learning_rate
