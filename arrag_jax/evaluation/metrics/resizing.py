"""Scales images to the input of the FID network, by each of the four rules in use; each gives another FID.

| rule | interpolation | range | used by |
| ---- | ------------- | ----- | ------- |
| clean | PIL's bicubic, antialiased, on float channels; clipped, not rounded | (x − 128) / 128 | clean-fid |
| tf1 | bilinear, corners at (0, 0), no antialiasing | (x − 128) / 128 | the first FID (TTUR), torch-fidelity |
| pytorch_fid | bilinear, centres aligned, no antialiasing | 2 x / 255 − 1 | pytorch-fid |
| torchmetrics | bilinear, centres aligned, antialiased | (x − 128) / 128 | torchmetrics 1.9 |

Positions and weights are float32 and are rounded where those programs round them, because a difference of one unit in
the last place of a position moves a pixel by up to 0.01 of 255 where neighbours differ most.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int, UInt8
from PIL import Image

from arrag_jax.errors import UserError
from arrag_jax.nn.inception import SIDE

ONE, HALF = np.float32(1), np.float32(0.5)


class Taps(NamedTuple):
    """A linear map along one axis: output i is the sum over t of ``weights[i, t]`` times input ``places[i, t]``."""

    places: Int[np.ndarray, "out taps"]
    weights: Float32[np.ndarray, "out taps"]


def resized(image: UInt8[np.ndarray, "h w 3"], rule: str, side: int = SIDE) -> Float32[np.ndarray, "side side 3"]:
    """Returns an image scaled to ``side`` x ``side`` pixels in about [-1, 1], whatever its shape.

    Args:
      rule: one of ``RULES``.

    Raises:
      UserError: if the rule is unknown.
    """
    pixels = RULES[require_rule(rule)](image, side)
    return pixels * np.float32(2 / 255) - ONE if rule == "pytorch_fid" else (pixels - 128) / 128


def require_rule(rule: str) -> str:
    """Returns the rule; raises UserError if it is unknown."""
    if rule not in RULES:
        raise UserError(f"resize={rule!r} is unknown; choose one of {', '.join(RULES)}")
    return rule


def bicubic(channel: Float32[np.ndarray, "h w"], side: int) -> Float32[np.ndarray, "side side"]:
    """Returns a channel scaled by PIL's antialiased bicubic filter, in float32 without rounding."""
    return np.asarray(Image.fromarray(channel).resize((side, side), Image.Resampling.BICUBIC))


def _clean(image: UInt8[np.ndarray, "h w 3"], side: int) -> Float32[np.ndarray, "side side 3"]:
    channels = [bicubic(np.ascontiguousarray(image[..., c], np.float32), side) for c in range(3)]
    return np.stack(channels, -1).clip(0, 255)


def _separable(taps: Callable[[int, int], Taps]) -> Callable[[UInt8[np.ndarray, "h w 3"], int], np.ndarray]:
    def resize(image: UInt8[np.ndarray, "h w 3"], side: int) -> Float32[np.ndarray, "side side 3"]:
        wide = _along(image.astype(np.float32).swapaxes(0, 1), taps(image.shape[1], side))
        return _along(wide.swapaxes(0, 1), taps(image.shape[0], side))

    return resize


def _along(x: Float[np.ndarray, "n m 3"], taps: Taps) -> Float[np.ndarray, "out m 3"]:
    """Returns x after the map of its first axis."""
    return sum(
        x[places] * weights[:, None, None] for places, weights in zip(taps.places.T, taps.weights.T, strict=True)
    )


@functools.cache
def _from_corners(size: int, side: int) -> Taps:
    """Returns TensorFlow 1's bilinear taps: the first pixels of input and output coincide."""
    return _two_taps(np.arange(side, dtype=np.float32) * (np.float32(size) / np.float32(side)), size)


@functools.cache
def _from_centres(size: int, side: int) -> Taps:
    """Returns the bilinear taps of images whose borders coincide."""
    scale = np.float64(np.float32(size) / np.float32(side))
    position = (scale * (np.arange(side) + 0.5) - 0.5).astype(np.float32)  # rounded once, as a fused multiply-add
    return _two_taps(np.maximum(position, 0), size)


def _two_taps(position: Float32[np.ndarray, " out"], size: int) -> Taps:
    below = np.floor(position).astype(np.int64).clip(0, size - 1)
    share = position - below.astype(np.float32)
    return Taps(np.stack([below, np.minimum(below + 1, size - 1)], 1), np.stack([ONE - share, share], 1))


@functools.cache
def _antialiased(size: int, side: int) -> Taps:
    """Returns the taps of a triangle filter as wide as an output pixel, at least as wide as an input pixel."""
    scale = np.float32(size) / np.float32(side)
    support = max(scale, ONE)
    centre = scale * (np.arange(side, dtype=np.float32) + HALF)
    first = np.maximum((centre - support + HALF).astype(np.int64), 0)
    count = np.minimum((centre + support + HALF).astype(np.int64), size) - first
    place = first[:, None] + np.arange(count.max())
    distance = np.abs(place.astype(np.float32) - centre[:, None] + HALF) / support
    weight = np.where(np.arange(count.max()) < count[:, None], np.maximum(ONE - distance, 0), np.float32(0))
    return Taps(np.minimum(place, size - 1), (weight / weight.sum(1, keepdims=True)).astype(np.float32))


RULES: dict[str, Callable[[UInt8[np.ndarray, "h w 3"], int], np.ndarray]] = {
    "clean": _clean,
    "tf1": _separable(_from_corners),
    "pytorch_fid": _separable(_from_centres),
    "torchmetrics": _separable(_antialiased),
}
