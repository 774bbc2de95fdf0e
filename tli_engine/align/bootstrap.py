"""Bootstrap over pairs: how far could a mean be off?"""

import numpy as np
from numpy.typing import NDArray

# indices drawn at a time, 16 MB
_BLOCK = 1 << 21


def bootstrap_means(values: NDArray[np.float64], draws: int, seed: int = 0) -> NDArray[np.float64]:
    """Means of resampled pairs.

    Args:
        values: One value a pair, or a row of values that stay together, ``[N]`` or ``[N, V]``.
        draws: Number of resamples.
        seed: Of the resampling.

    Returns:
        ``[draws]`` or ``[draws, V]``.
    """
    generator = np.random.default_rng(seed)
    size = len(values)
    # column by column: rows of a few numbers are slow to gather
    columns = np.ascontiguousarray(values.reshape(size, -1).T)
    block = max(1, _BLOCK // values.size)
    means = []
    for done in range(0, draws, block):
        drawn = generator.integers(0, size, (min(block, draws - done), size))
        means.append(np.stack([column[drawn].mean(1) for column in columns], 1))
    whole: NDArray[np.float64] = np.concatenate(means).reshape(draws, *values.shape[1:])
    return whole
