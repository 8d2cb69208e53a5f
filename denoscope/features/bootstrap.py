"""Bootstrap intervals of means over pictures (Efron, Annals of Statistics 7, 1979): percentiles of resampled means."""

from collections.abc import Sequence
from typing import Any

import numpy as np

LEVEL, RESAMPLES = 0.95, 2000


def interval(
    values: np.ndarray | Sequence[Any], level: int | float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float] | None:
    """(low, high) of the mean of `values`, [pictures] or [pictures, seeds]; None for a single value.

    Pictures are drawn with replacement, and for each of them its seeds. Of a single picture only the seeds vary. From few
    pictures (fewer than about 8) the interval is too narrow: it knows no other pictures than these.
    """
    table = np.asarray(values, np.float64)
    table = table[:, None] if table.ndim == 1 else table
    if table.size < 2:
        return None
    rng, (pictures, seeds) = np.random.default_rng(seed), table.shape
    rows = rng.integers(pictures, size=(resamples, pictures, 1))
    columns = rng.integers(seeds, size=(resamples, pictures, seeds))
    low, high = np.quantile(table[rows, columns].mean((1, 2)), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
