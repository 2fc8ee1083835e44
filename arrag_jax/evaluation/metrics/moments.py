"""Sums features over images exactly, so that the result does not depend on order, batches or interruptions.

Features are rounded to whole multiples of a step. Their sums and the sums of their products are 64-bit integers, which
are added without rounding. The matrix products that give them are computed in float64, from parts that are so small
that no sum exceeds the 53 bits of a float64.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int64

from arrag_jax.errors import UserError
from arrag_jax.evaluation.metrics.frechet import Gaussian
from arrag_jax.files import atomic_write

FEATURE_STEP = 2.0**-16  # of Inception features, which are below 32; it adds 4e-8 to the trace of the covariance
LARGEST = 2**21  # multiples of the step that a feature can have
MOST = 2**20  # images; 2^20 products of 2^42 fit into 63 bits
PART_BITS = 11  # of the lower part of a feature
BLOCK = 4096  # rows that are multiplied at once; 2^12 products of parts, 2^20 each, fit into 53 bits


@dataclasses.dataclass
class Moments:
    """The sums over images of a vector of integers and of its products; the features are ``step`` times the integers.

    Attributes:
      step: unit of the integers.
      count: number of images.
      total: sum of the vectors.
      products: sum of the outer products of each vector with itself.
    """

    step: float
    count: int
    total: Int64[np.ndarray, " D"]
    products: Int64[np.ndarray, "D D"]

    @classmethod
    def empty(cls, width: int, step: float = FEATURE_STEP) -> "Moments":
        """Returns the moments of no image."""
        return cls(step, 0, np.zeros(width, np.int64), np.zeros((width, width), np.int64))

    @classmethod
    def load(cls, path: Path) -> "Moments":
        """Returns the moments that ``save`` wrote.

        Raises:
          UserError: if the file is missing or damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                return cls(float(file["step"]), int(file["count"]), file["total"], file["products"])
        except Exception as error:  # zipfile, zlib and numpy raise many types for damage
            raise UserError(f"{path} does not hold moments ({error or type(error).__name__}); delete it") from error

    def save(self, path: Path) -> None:
        """Writes the moments atomically, with mean and covariance as ``mu`` and ``sigma``, which pytorch-fid reads."""
        held: dict[str, Any] = {"step": np.float64(self.step), "count": np.int64(self.count)}
        held |= {"total": self.total, "products": self.products}
        held |= {"mu": self.mean, "sigma": self.covariance} if self.count > 1 else {}
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **held)

    def add(self, features: Float[np.ndarray, "n D"]) -> None:
        """Adds images by their features, rounded to the step.

        Raises:
          UserError: if a feature is not finite or too large for the step, or there are too many images.
        """
        largest = max(float(features.max(initial=0)), -float(features.min(initial=0))) / self.step
        if not largest < LARGEST - 1:
            raise UserError(f"a feature of {largest * self.step:g} is not below {LARGEST * self.step:g}")
        self._require_room(len(features))
        for first in range(0, len(features), BLOCK):
            block = np.rint(np.asarray(features[first : first + BLOCK], np.float64) / self.step)
            self.total += block.sum(0).astype(np.int64)
            self.products += _products(block, largest + 1)
        self.count += len(features)

    def __add__(self, other: "Moments") -> "Moments":
        """Returns the moments of both sets of images.

        Raises:
          UserError: if the features or their steps differ, or there are too many images.
        """
        if (self.step, self.total.shape) != (other.step, other.total.shape):
            raise UserError("moments of different features cannot be added")
        self._require_room(other.count)
        return Moments(self.step, self.count + other.count, self.total + other.total, self.products + other.products)

    @property
    def mean(self) -> Float64[np.ndarray, " D"]:
        """Mean of the features."""
        return self.total / self.count * self.step

    @property
    def covariance(self) -> Float64[np.ndarray, "D D"]:
        """Unbiased covariance of the features."""
        total = self.total.astype(np.longdouble)
        centred = self.products.astype(np.longdouble) - np.outer(total, total / self.count)
        return (centred / (self.count - 1)).astype(np.float64) * self.step**2

    def gaussian(self) -> Gaussian:
        """Returns the normal distribution of these moments; raises UserError if there are fewer than two images."""
        if self.count < 2:
            raise UserError(f"a distance needs at least two images in each set; one has {self.count}")
        return Gaussian.of_covariance(self.mean, self.covariance, self.count)

    def _require_room(self, more: int) -> None:
        if self.count + more > MOST:
            raise UserError(f"{self.count + more:,} images are more than the {MOST:,} that are summed exactly")


def _products(block: Float64[np.ndarray, "n D"], largest: float) -> Int64[np.ndarray, "D D"]:
    """Returns the exact sum of the outer products of integers in float64."""
    if largest**2 * len(block) < 2**53:
        return (block.T @ block).astype(np.int64)
    high = np.rint(block / 2**PART_BITS)
    low = block - high * 2**PART_BITS
    mixed = (high.T @ low).astype(np.int64)
    return (
        ((high.T @ high).astype(np.int64) << 2 * PART_BITS)
        + ((mixed + mixed.T) << PART_BITS)
        + (low.T @ low).astype(np.int64)
    )
