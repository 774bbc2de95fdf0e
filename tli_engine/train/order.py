"""Which pairs make up a batch: a function of seed, epoch and number, with no state to save."""

import torch


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Batches in an epoch; a last batch of one pair, which has no negative, joins the one before."""
    full, rest = divmod(rows, batch_size)
    return full + (rest > 1) if full else 1


def batch_rows(rows: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Rows of the batch of a step, counted from 0 over all epochs; each row once an epoch."""
    epoch, number = divmod(step, steps_per_epoch(rows, batch_size))
    generator = torch.Generator().manual_seed(_mix(seed, epoch))
    order = torch.randperm(rows, generator=generator).tolist()
    last = number == steps_per_epoch(rows, batch_size) - 1
    return order[number * batch_size : None if last else (number + 1) * batch_size]


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Seed of the random numbers of one step, such as its dropout masks; each rank has its own."""
    of_step = _mix(seed, step + 2**32)
    return _mix(of_step, rank) if rank else of_step


def _mix(seed: int, number: int) -> int:
    """Spread (seed, number) over 63 bits, as SplitMix64 does."""
    z = (seed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) >> 1
