"""Computes squared maximum mean discrepancies of two sets of features: KID and CMMD.

Kernels are summed in float64, a block of pairs at a time, so that memory does not grow with the number of pairs.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Float64, Int

from arrag_jax.errors import UserError
from arrag_jax.evaluation.metrics.samples import Estimate, pair
from arrag_jax.interfaces import ArrayLike

BLOCK = 2048  # rows whose pairs are in memory at once
SIGMA = 10.0  # of CMMD's Gaussian kernel
SCALE = 1000.0  # CMMD is given in thousandths
SUBSETS, SUBSET = 100, 1000  # how many subsets KID is usually averaged over, and of how many images each
# From the inner products of two sets, and the squared norms of both, to the kernel
Kernel = Callable[
    [Float64[np.ndarray, "n m"], Float64[np.ndarray, "n 1"], Float64[np.ndarray, "1 m"]], Float64[np.ndarray, "n m"]
]


def kernel_distance(a: ArrayLike, b: ArrayLike) -> float:
    """Returns the unbiased squared MMD of two sets of features [N, D] with the kernel (x·y / D + 1)³.

    Of Inception features it is the KID over the full sets. It can be below 0.

    Raises:
      UserError: if the sets are not finite features of the same network, of at least two images each.
    """
    return kid(*pair(a, b)).value


def cmmd(a: ArrayLike, b: ArrayLike) -> float:
    """Returns 1000 times the biased squared MMD of two sets of features [N, D] with a Gaussian kernel of σ = 10.

    Of the unit vectors that CLIP ViT-L/14 at 336 pixels gives, it is the CMMD.

    Raises:
      UserError: as ``kernel_distance``.
    """
    return cmmd_estimate(*pair(a, b)).value


def kid(x: Float[np.ndarray, "n D"], y: Float[np.ndarray, "m D"]) -> Estimate:
    """Returns the KID over the full sets, and how each image of the first set changes it."""
    return _mmd(x, y, _cubic(x.shape[1]), unbiased=True)


def cmmd_estimate(x: Float[np.ndarray, "n D"], y: Float[np.ndarray, "m D"]) -> Estimate:
    """Returns the CMMD, and how each image of the first set changes it."""
    value, influence = _mmd(x, y, _gaussian, unbiased=False)
    return Estimate(SCALE * value, SCALE * influence)


def kid_of_subsets(
    x: Float[np.ndarray, "n D"], y: Float[np.ndarray, "m D"], seed: int = 0, subsets: int = SUBSETS
) -> tuple[float, float, int]:
    """Returns mean and standard deviation of the KID over random subsets of both sets, and their size.

    Papers give the mean and call the deviation its error. The subsets have ``SUBSET`` images, or fewer if a set is
    smaller.
    """
    size, rng = min(SUBSET, len(x), len(y)), np.random.default_rng(seed)
    kernel = _cubic(x.shape[1])
    values = [
        _mmd(x[_some(rng, len(x), size)], y[_some(rng, len(y), size)], kernel, unbiased=True).value
        for _ in range(subsets)
    ]
    return float(np.mean(values)), float(np.std(values)), size


def _some(rng: np.random.Generator, count: int, size: int) -> Int[np.ndarray, " size"]:
    return rng.choice(count, size, replace=False)


def _cubic(width: int) -> Kernel:
    return lambda products, _, __: (products / width + 1) ** 3


def _gaussian(products: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.exp((2 * products - x - y).clip(max=0) / (2 * SIGMA**2))


def _mmd(x: Float[np.ndarray, "n D"], y: Float[np.ndarray, "m D"], kernel: Kernel, unbiased: bool) -> Estimate:
    """Returns the squared MMD; ``unbiased`` leaves out the pairs of an image with itself."""
    n, m = len(x), len(y)
    if unbiased and min(n, m) < 2:
        raise UserError("an unbiased distance needs at least two images in each set")
    rows_xx, rows_yy = _row_sums(x, x, kernel, unbiased), _row_sums(y, y, kernel, unbiased)
    rows_xy = _row_sums(x, y, kernel, False)
    others = int(unbiased)
    xx, yy, xy = rows_xx.sum() / (n * (n - others)), rows_yy.sum() / (m * (m - others)), rows_xy.sum() / (n * m)
    influence = 2 * (rows_xx / (n - others) - rows_xy / m)
    return Estimate(float(xx + yy - 2 * xy), influence - influence.mean())


def _row_sums(x: np.ndarray, y: np.ndarray, kernel: Kernel, but_itself: bool) -> Float64[np.ndarray, " n"]:
    """Returns the kernel's sum over y for each row of x; ``but_itself`` leaves the diagonal out."""
    totals = np.zeros(len(x))
    for i in range(0, len(x), BLOCK):
        rows = x[i : i + BLOCK].astype(np.float64)
        rows_squared = np.square(rows).sum(1)[:, None]
        for j in range(0, len(y), BLOCK):
            columns = y[j : j + BLOCK].astype(np.float64)
            block = kernel(rows @ columns.T, rows_squared, np.square(columns).sum(1)[None])
            if but_itself and i == j:
                np.fill_diagonal(block, 0)
            totals[i : i + BLOCK] += block.sum(1)
    return totals
