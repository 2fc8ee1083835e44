"""Computes the Fréchet wavelet distance (FWD): the mean Fréchet distance over the packets of a Haar transform.

The packets of level L are the coefficients of the Walsh–Hadamard transform of each block of 2^L x 2^L pixels: with the
matrix H of signs, H B Hᵀ / 2^L of a block B. A packet holds one coefficient of each block and channel. Pixels are
integers, so that the coefficients are integers, too, until they are scaled. Source: Veeramacheneni et al. 2023.
"""

import numpy as np
from jaxtyping import Float32, UInt8

from arrag_jax.errors import UserError
from arrag_jax.evaluation.metrics.frechet import Gaussian, distance
from arrag_jax.evaluation.metrics.samples import uint8_images
from arrag_jax.interfaces import ArrayLike

LEVEL = 4


def fwd(images_a: ArrayLike, images_b: ArrayLike, level: int = LEVEL) -> float:
    """Returns the Fréchet wavelet distance of two sets of images of the same size.

    Args:
      images_a, images_b: RGB pixels, uint8 [N, h, w, 3], at least two images each; h and w are multiples of 2^level.
      level: number of times that the Haar packets are split, from 1 to 8.

    Raises:
      UserError: if the images do not have this form.
    """
    a, b = (uint8_images(name, images) for name, images in (("images_a", images_a), ("images_b", images_b)))
    if a.shape[1:] != b.shape[1:]:
        raise UserError(f"images_a are {list(a.shape[1:])} and images_b {list(b.shape[1:])}; give images of one size")
    if min(len(a), len(b)) < 2:
        raise UserError(f"a distance needs at least two images in each set, not {len(a)} and {len(b)}")
    require_level(level, *a.shape[1:3])
    scale, distances = step(level), []
    for row in range(2**level):
        for x, y in zip(packets(a, level, row), packets(b, level, row), strict=True):
            distances.append(distance(*(Gaussian.of_features(z.astype(np.float64) * scale) for z in (x, y))))
    return float(np.mean(distances))


def step(level: int) -> float:
    """Returns the factor from the integers of ``packets`` to coefficients of pixels in [0, 1]."""
    return 1 / (255 * 2**level)


def packets(images: UInt8[np.ndarray, "N h w 3"], level: int, row: int) -> Float32[np.ndarray, "P N D"]:
    """Returns the 2^level packets of one row of the transform, as integers without scale, which float32 holds exactly.

    D is 3 · h · w / 4^level. Packet (0, 0) holds the means of the blocks.
    """
    side, (n, h, w, c) = 2**level, images.shape
    signs = hadamard(level)
    blocks = images.reshape(n * h // side, side, w * c).astype(np.float32)
    rows = (signs[row : row + 1] @ blocks).reshape(n, h // side, w // side, side, c)
    both = rows.swapaxes(3, 4) @ signs  # [n, h / side, w / side, c, P], because the matrix is symmetric
    return np.moveaxis(both, -1, 0).reshape(side, n, -1)


def hadamard(level: int) -> Float32[np.ndarray, "P P"]:
    """Returns Sylvester's Hadamard matrix of size 2^level."""
    matrix = np.ones((1, 1), np.float32)
    for _ in range(level):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def require_level(level: int, height: int, width: int) -> None:
    """Raises UserError if images of this size cannot be split into packets of the level."""
    if not 1 <= level <= 8:
        raise UserError(f"level={level} must be from 1 to 8")
    if height % 2**level or width % 2**level or 0 in (height, width):
        raise UserError(f"FWD of level {level} needs sides that are multiples of {2**level}, not {height} x {width}")
