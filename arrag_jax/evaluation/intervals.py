"""Intervals of means over prompts, by the bootstrap: prompts are drawn again with replacement, images never are.

Images of one prompt are alike, so an interval over images would be too narrow.
"""

import numpy as np
from jaxtyping import Float

RESAMPLES = 2000
LEVEL = 0.95  # share of the resampled means that an interval holds
BLOCK = 2**22  # numbers that are resampled at once


def bootstrap(
    values: Float[np.ndarray, "R P"], seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """Returns the mean of a metric, and the limits of its 95 % interval over prompts.

    Args:
      values: R values of each of P prompts, such as one per seed.
      seed: seed of the resampling.
      resamples: number of samples of P prompts.
    """
    means = resampled_means(values.mean(0), np.ones(values.shape[1]), seed, resamples)
    return (float(values.mean()), *interval(means))


def resampled_means(
    values: Float[np.ndarray, " P"], weights: Float[np.ndarray, " P"], seed: int = 0, resamples: int = RESAMPLES
) -> Float[np.ndarray, " N"]:
    """Returns the weighted mean of each of N = ``resamples`` samples of the P prompts.

    The numbers of P prompts are drawn from the seed alone, so the means of two metrics of the same prompts are paired.
    A sample whose weights are all 0 has the mean of all prompts.
    """
    rng, count = np.random.default_rng([seed, len(values)]), len(values)
    total, sums = float(weights.sum()), []
    for start in range(0, resamples, max(1, BLOCK // count)):
        drawn = rng.integers(0, count, (min(max(1, BLOCK // count), resamples - start), count))
        weight = weights[drawn].sum(1)
        empty = weight == 0
        mean = (values * weights)[drawn].sum(1) / np.where(empty, 1.0, weight)
        sums.append(np.where(empty, (values * weights).sum() / total if total else np.nan, mean))
    return np.concatenate(sums)


def interval(means: Float[np.ndarray, " N"]) -> tuple[float, float]:
    """Returns the limits between which the central 95 % of resampled means lie."""
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
