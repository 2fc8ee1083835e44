"""Confidence intervals of means, by the bootstrap over prompts."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

RESAMPLES = 2000


class Interval(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def bootstrap(
    values: Float[np.ndarray, "R P"] | Bool[np.ndarray, "R P"], seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Returns the mean of all values, and the range of 95 % of the means over resampled columns.

    A column holds the R repeats of one prompt; they are resampled together, because they are not independent. Source:
    Efron (1979), percentile method.

    Args:
      values: at least one column.
      seed: of the resampling; the result depends on nothing else.
    """
    columns = np.asarray(values, np.float64).mean(0)
    rng = np.random.default_rng(seed)
    means = [columns[rng.integers(0, len(columns), len(columns))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, (2.5, 97.5))
    return Interval(float(columns.mean()), float(low), float(high))
