"""Bootstrap over pairs: how far could a mean be off?"""

import numpy as np
import torch
from numpy.typing import NDArray

# indices drawn at a time
_BLOCK = 1 << 21


def bootstrap_means(
    values: NDArray[np.float64],
    draws: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> NDArray[np.float64]:
    """Means of resampled pairs.

    Args:
        values: One value a pair, or a row of values that stay together, ``[N]`` or ``[N, V]``.
        draws: Number of resamples.
        seed: Of the resampling, which is the same on any device.
        device: Where the resamples are gathered; they are drawn on the CPU.

    Returns:
        ``[draws]`` or ``[draws, V]``.
    """
    generator = np.random.default_rng(seed)
    size = len(values)
    # numpy draws small integers several times as fast
    dtype = np.int16 if size <= np.iinfo(np.int16).max else np.int64
    # column by column: rows of a few numbers are slow to gather
    columns = torch.from_numpy(np.ascontiguousarray(values.reshape(size, -1).T)).to(device)
    block = max(1, _BLOCK // values.size)
    means = []
    for done in range(0, draws, block):
        drawn = generator.integers(0, size, (min(block, draws - done), size), dtype=dtype)
        # int32 takes half the way through memory that int64 takes
        rows = torch.from_numpy(drawn).to(device)
        rows = rows.int() if rows.dtype == torch.int16 else rows
        picked = [c.index_select(0, rows.view(-1)).view(rows.shape).mean(1) for c in columns]
        means.append(torch.stack(picked, 1))
    whole: NDArray[np.float64] = torch.cat(means).cpu().numpy()
    return whole.reshape(draws, *values.shape[1:])
