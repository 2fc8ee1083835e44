"""Computes the Fréchet distance of two normal distributions that are fitted to features (FID).

‖μ₁ − μ₂‖² + tr S₁ + tr S₂ − 2 tr √(S₁ S₂), with unbiased covariances. If S = F Fᵀ, the last trace is the nuclear norm
of F₁ᵀ F₂, which needs no matrix root and stays exact if a set has fewer images than features. The usual code computes
the root of a singular matrix then, and gives other numbers from run to run.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64

from arrag_jax.errors import UserError
from arrag_jax.evaluation.metrics.samples import Estimate, pair
from arrag_jax.interfaces import ArrayLike

# Above this size the nuclear norm comes from eigenvalues of the squared matrix, which take a fraction of the time of
# singular values. Squaring costs half of the digits of singular values near zero; few of those matter in large sets.
LARGE = 1024
NOISE = 1e-13  # squared length of a column, relative to the longest, below which it is rounding
BLOCK = 4096  # images whose features are in memory in float64


class Gaussian(NamedTuple):
    """A normal distribution, with its covariance as F Fᵀ.

    Attributes:
      mean: of the features.
      factor: F; r is the rank that the number of images allows.
      images: number of images that it was fitted to; 0 = unknown.
    """

    mean: Float64[np.ndarray, " D"]
    factor: Float64[np.ndarray, "D r"]
    images: int

    @classmethod
    def of_features(cls, x: Float64[np.ndarray, "n D"]) -> "Gaussian":
        """Returns the distribution with the mean and the unbiased covariance of features."""
        mean = x.mean(0)
        centred = (x - mean) / np.sqrt(len(x) - 1)
        factor = centred if len(x) <= x.shape[1] else np.asarray(np.linalg.qr(centred, "r"))
        return cls(mean, factor.T, len(x))

    @classmethod
    def of_covariance(
        cls, mean: Float64[np.ndarray, " D"], covariance: Float64[np.ndarray, "D D"], images: int = 0
    ) -> "Gaussian":
        """Returns a distribution by mean and covariance, with orthogonal columns in ``factor``.

        Args:
          images: number of images, which bounds the rank; 0 = unknown.

        Raises:
          UserError: if the covariance is not symmetric, or has a negative eigenvalue.
        """
        scale = np.abs(covariance).max()
        if not np.abs(covariance - covariance.T).max() <= 1e-6 * scale:
            raise UserError("the covariance is not symmetric, or not finite")
        values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
        if values[0] < -1e-6 * scale * len(values):
            raise UserError(f"the covariance has a negative eigenvalue, {values[0]:.3g}")
        rank = min(images - 1, len(values)) if images else len(values)
        values, vectors = values[len(values) - rank :], vectors[:, len(values) - rank :]
        return cls(mean, vectors * np.sqrt(values.clip(0)), images)

    def orthogonal(self) -> "Gaussian":
        """Returns the same distribution with orthogonal columns in ``factor``; those that are only rounding go."""
        values, vectors = np.linalg.eigh(self.factor.T @ self.factor)
        return self._replace(factor=self.factor @ vectors[:, values > NOISE * values[-1]])

    @property
    def trace(self) -> float:
        """Sum of the variances."""
        return float(np.square(self.factor).sum())


def frechet_distance(a: ArrayLike, b: ArrayLike) -> float:
    """Returns the Fréchet distance of two sets of features [N, D]; of Inception features it is the FID.

    The distance of two small samples is far above that of their distributions. With at most D images in a set, its
    covariance is rank-deficient; the result is exact then, too, but compares with nothing but sets of the same sizes.

    Raises:
      UserError: if the sets are not finite features of the same network, of at least two images each.
    """
    x, y = pair(a, b)
    return distance(Gaussian.of_features(x), Gaussian.of_features(y))


def distance(a: Gaussian, b: Gaussian) -> float:
    """Returns the Fréchet distance of two normal distributions."""
    product = a.factor.T @ b.factor
    if min(product.shape) <= LARGE:
        norm = np.linalg.svd(product, compute_uv=False).sum()
    else:
        squared = product @ product.T if len(product) <= product.shape[1] else product.T @ product
        norm = np.sqrt(np.linalg.eigvalsh(squared).clip(0)).sum()
    return float(np.square(a.mean - b.mean).sum() + a.trace + b.trace - 2 * norm)


class Derivative(NamedTuple):
    """How an image changes the distance of its set from another one, up to a constant.

    In the direction of an image x the derivative is 2 (μ₁ − μ₂)·(x − μ₁) + (x − μ₁)ᵀ (1 − T) (x − μ₁) n / (n − 1), less
    its mean, where T = √(S₁⁻¹ S₂) is the map that transports the first distribution to the second.

    Attributes:
      mean: μ₁.
      shift: μ₁ − μ₂.
      half: of T = half halfᵀ.
      images: n, in the first set.
    """

    mean: Float64[np.ndarray, " D"]
    shift: Float64[np.ndarray, " D"]
    half: Float64[np.ndarray, "D r"]
    images: int

    @classmethod
    def of(cls, a: Gaussian, b: Gaussian) -> "Derivative":
        """Returns the derivative for images of ``a``, whose factor has orthogonal columns."""
        squared = (product := a.factor.T @ b.factor) @ product.T
        values, vectors = np.linalg.eigh(squared)
        roots = np.sqrt(np.sqrt(values.clip(0)))
        lengths = np.square(a.factor).sum(0)  # of orthogonal columns, which are inverted one by one
        inverse = np.divide(a.factor, lengths, out=np.zeros_like(a.factor), where=lengths > 0)
        return cls(a.mean, a.mean - b.mean, inverse @ (vectors * roots), a.images)

    def __call__(self, x: Float[np.ndarray, "n D"]) -> Float64[np.ndarray, " n"]:
        """Returns the derivative for each image, by its features."""
        centred = x - self.mean
        squares = np.square(centred).sum(1) - np.square(centred @ self.half).sum(1)
        return 2 * centred @ self.shift + squares * self.images / (self.images - 1)


def estimate(x: Float[np.ndarray, "n D"], a: Gaussian, b: Gaussian) -> Estimate:
    """Returns the distance, and how each image of the first set changes it.

    Args:
      x: the features of the first set.
      a: the distribution of the first set, with orthogonal columns in its factor.
      b: the distribution of the second set.
    """
    derivative = Derivative.of(a, b)
    influence = np.concatenate([derivative(x[first : first + BLOCK]) for first in range(0, len(x), BLOCK)])
    return Estimate(distance(a, b), influence - influence.mean())
