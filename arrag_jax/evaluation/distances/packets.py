"""Computes the Fréchet wavelet distance of sets that do not fit into memory, a few packets at a time."""

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Float64, UInt8
from PIL import Image

from arrag_jax import progress
from arrag_jax.errors import UserError
from arrag_jax.evaluation.feature_store import FeatureStore
from arrag_jax.evaluation.image_sets import ImageSet
from arrag_jax.evaluation.metrics.frechet import distance
from arrag_jax.evaluation.metrics.moments import Moments
from arrag_jax.evaluation.metrics.wavelets import packets, require_level, step

MEMORY = 2**30  # bytes of the moments that are summed at once
BLOCK = 128  # images that are transformed at once
READERS = 4


def streamed_fwd(drawn: ImageSet, true: ImageSet, level: int, store: FeatureStore, identity: str) -> float:
    """Returns the FWD of two sets of images; images of another size than the first drawn one are scaled to it.

    The images are read once for every few rows of packets, as many as fit into ``MEMORY``. The distances of each few
    rows are kept, so that a killed run continues.

    Args:
      identity: of the bytes of both sets.

    Raises:
      UserError: if an image cannot be read.
    """
    size: tuple[int, int] = drawn.pixels(0).shape[:2]
    side, width = 2**level, 3 * size[0] * size[1] // 4**level
    rows = max(1, min(side, MEMORY // (2 * side * width**2 * 8)))
    found: list[np.ndarray] = []
    with progress.bar(desc="wavelet packets", total=side, unit="row") as bar:
        for first in range(0, side, rows):
            taken = range(first, min(first + rows, side))
            key = f"packets of level {level}, {taken}, {identity}"
            compute = functools.partial(_distances, drawn, true, size, level, taken)
            found.append(store.kept(key, (len(taken) * side,), compute))
            bar.update(len(taken))
    return float(np.concatenate(found).mean())


def require_packets(drawn: ImageSet, level: int) -> None:
    """Raises UserError if drawn images differ in size, or their sides do not fit the level. It reads no pixels."""
    first = drawn.size(0)
    require_level(level, *first)
    for number in range(1, len(drawn)):
        if (size := drawn.size(number)) != first:
            raise UserError(
                f"{drawn.ids[number]} has {size[0]} x {size[1]} pixels, {drawn.ids[0]} {first[0]} x {first[1]}; FWD "
                "needs one size: draw it again, or leave FWD out (--fwd_level=0)"
            )


def _distances(
    drawn: ImageSet, true: ImageSet, size: tuple[int, int], level: int, rows: range
) -> Float64[np.ndarray, " packets"]:
    """Returns the distance of each packet of some rows."""
    both = [_moments(images, size, level, rows) for images in (drawn, true)]
    return np.array([distance(a.gaussian(), b.gaussian()) for a, b in zip(*both, strict=True)])


def _moments(images: ImageSet, size: tuple[int, int], level: int, rows: range) -> list[Moments]:
    """Returns the exact moments of each packet of some rows."""
    width = 3 * size[0] * size[1] // 4**level
    found = [Moments.empty(width, step(level)) for _ in range(len(rows) * 2**level)]
    for block in _blocks(images, size):
        for i, row in enumerate(rows):
            for j, packet in enumerate(packets(block, level, row)):
                found[i * 2**level + j].add(packet * np.float64(step(level)))
    return found


def _blocks(images: ImageSet, size: tuple[int, int]) -> Iterator[UInt8[np.ndarray, "n h w 3"]]:
    def read(number: int) -> UInt8[np.ndarray, "h w 3"]:
        pixels = images.pixels(number)
        if pixels.shape[:2] == size:
            return pixels
        return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC))

    with ThreadPoolExecutor(READERS) as pool:
        for first in range(0, len(images), BLOCK):
            yield np.stack(list(pool.map(read, range(first, min(first + BLOCK, len(images))))))
