"""Computes precision, recall, density and coverage of drawn images in the space of features.

A ball around each image reaches to its k-th nearest neighbour in its own set. Source: Kynkäänniemi et al. 2019
(precision, recall) and Naeem et al. 2020 (density, coverage), whose k is 5.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int

from arrag_jax.errors import UserError
from arrag_jax.evaluation.metrics.samples import Estimate, pair
from arrag_jax.interfaces import ArrayLike

NEAREST = 5
BLOCK = 2048  # rows whose distances are in memory at once


class Manifold(NamedTuple):
    """Four figures of drawn images (a) against true ones (b).

    Attributes:
      precision: share of drawn images inside the ball of a true one.
      recall: share of true images inside the ball of a drawn one.
      density: balls of true images that a drawn one is in, divided by k; the mean. It can exceed 1.
      coverage: share of true images whose ball holds a drawn one.

    The influences of recall and coverage are those of true images.
    """

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate


def precision_recall(a: ArrayLike, b: ArrayLike, nearest: int = NEAREST) -> Manifold:
    """Returns the four figures of drawn features ``a`` against true features ``b``.

    Raises:
      UserError: as ``samples.pair``, or if a set has no more images than ``nearest``.
    """
    return manifold(*pair(a, b), nearest)


def manifold(drawn: Float[np.ndarray, "n D"], true: Float[np.ndarray, "m D"], nearest: int = NEAREST) -> Manifold:
    """Returns the figures of ``precision_recall`` for features that are known to be valid."""
    if not 1 <= nearest < min(len(drawn), len(true)):
        raise UserError(f"nearest={nearest} must be at least 1 and below the images of both sets")
    drawn_reach, true_reach = _reach(drawn, nearest), _reach(true, nearest)
    inside = np.zeros(len(drawn), np.int64)  # balls of true images that a drawn one is in
    recalled, covered = np.zeros(len(true), bool), np.zeros(len(true), bool)
    for i in range(0, len(true), BLOCK):
        for j in range(0, len(drawn), BLOCK):
            rows, columns = slice(i, i + BLOCK), slice(j, j + BLOCK)
            distances = _squared(true[rows], drawn[columns])
            in_true = distances < true_reach[rows, None]
            inside[columns] += in_true.sum(0)
            covered[rows] |= in_true.any(1)
            recalled[rows] |= (distances < drawn_reach[None, columns]).any(1)
    return Manifold(_mean(inside > 0), _mean(recalled), _mean(inside / nearest), _mean(covered))


def _mean(values: Bool[np.ndarray, " n"] | Int[np.ndarray, " n"] | Float64[np.ndarray, " n"]) -> Estimate:
    return Estimate(float(values.mean()), values - values.mean(dtype=np.float64))


def _reach(x: Float[np.ndarray, "n D"], nearest: int) -> Float64[np.ndarray, " n"]:
    """Returns each row's squared distance to its ``nearest``-th other row."""
    reach = np.empty(len(x))
    for i in range(0, len(x), BLOCK):
        kept = np.full((len(x[i : i + BLOCK]), 0), np.inf)
        for j in range(0, len(x), BLOCK):
            distances = _squared(x[i : i + BLOCK], x[j : j + BLOCK])
            if i == j:
                np.fill_diagonal(distances, np.inf)
            kept = np.concatenate([kept, distances], 1)
            if kept.shape[1] > nearest:
                kept = np.partition(kept, nearest - 1, 1)[:, :nearest]
        reach[i : i + BLOCK] = kept.max(1)
    return reach


def _squared(x: Float[np.ndarray, "n D"], y: Float[np.ndarray, "m D"]) -> Float64[np.ndarray, "n m"]:
    x, y = x.astype(np.float64), y.astype(np.float64)
    return np.square(x).sum(1)[:, None] + np.square(y).sum(1)[None] - 2 * x @ y.T
