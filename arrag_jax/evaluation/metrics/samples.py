"""Checks sets of features and of images, and defines the estimate that every distance returns."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, UInt8

from arrag_jax.errors import UserError
from arrag_jax.interfaces import ArrayLike

NORMAL_95 = 1.959963984540054  # half the width of a 95 % interval, in standard errors


class Estimate(NamedTuple):
    """A figure of a set of images, and how much each of them contributes to it.

    The figure is a smooth function of the images' distribution. To first order, its sampling error is the mean of the
    images' influences, so that their spread gives the standard error (the infinitesimal jackknife). The error that
    remains if the number of images is small, the bias, is not part of it.

    Attributes:
      value: the figure.
      influence: derivative of the figure with respect to the weight of each image; its mean is about 0.
    """

    value: float
    influence: Float64[np.ndarray, " n"]

    @property
    def error(self) -> float:
        """Standard error over the images of the set; the other set counts as fixed."""
        return float(self.influence.std(ddof=1) / math.sqrt(len(self.influence)))

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval over the images of the set."""
        return self.value - NORMAL_95 * self.error, self.value + NORMAL_95 * self.error


def pair(a: ArrayLike, b: ArrayLike) -> tuple[Float64[np.ndarray, "n D"], Float64[np.ndarray, "m D"]]:
    """Returns two sets of features in float64.

    Raises:
      UserError: if they are not [N, D] of the same D, have fewer than two rows, or are not finite.
    """
    x, y = (features(name, set_) for name, set_ in (("a", a), ("b", b)))
    if x.shape[1] != y.shape[1]:
        raise UserError(f"a has {x.shape[1]} features and b {y.shape[1]}; they must come from the same network")
    return x, y


def features(name: str, given: ArrayLike) -> Float64[np.ndarray, "n D"]:
    """Returns one set of features in float64; raises UserError as ``pair``."""
    try:
        x = np.asarray(given, np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} must be an array of numbers [N, D] ({error})") from error
    if x.ndim != 2 or len(x) < 2 or x.shape[1] < 1:
        raise UserError(f"{name} must be features [N, D] of at least two images, not an array {list(x.shape)}")
    if not np.isfinite(x).all():
        raise UserError(f"{name} holds NaN or infinite features")
    return x


def uint8_images(name: str, given: ArrayLike) -> UInt8[np.ndarray, "N h w 3"]:
    """Returns a set of images as an array; raises UserError unless they are uint8 [N, h, w, 3]."""
    images = np.asarray(given)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:]:
        raise UserError(f"{name} must be uint8 [N, h, w, 3], not {images.dtype} {list(images.shape)}")
    return images
