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
from arrag_jax.evaluation.metrics.frechet import Derivative, distance
from arrag_jax.evaluation.metrics.moments import Moments
from arrag_jax.evaluation.metrics.samples import Estimate
from arrag_jax.evaluation.metrics.wavelets import packets, require_level, step

MEMORY = 2**30  # bytes of the moments that are summed at once
BLOCK = 128  # images that are transformed at once
READERS = 4


def streamed_fwd(drawn: ImageSet, true: ImageSet, level: int, store: FeatureStore, identity: str) -> Estimate:
    """Returns the FWD of two sets, and how each drawn image changes it; other sizes than the first's are scaled to it.

    The images are read for every few rows of packets, as many as fit into ``MEMORY``: once for the distributions, and
    the drawn ones again for their influences. The results of each few rows are kept, so that a killed run continues.

    Args:
      identity: of the bytes of both sets.

    Raises:
      UserError: if an image cannot be read.
    """
    size: tuple[int, int] = drawn.pixels(0).shape[:2]
    side, width = 2**level, 3 * size[0] * size[1] // 4**level
    rows = max(1, min(side, MEMORY // (2 * side * width**2 * 8)))
    packets_done, influence = list[np.ndarray](), np.zeros(len(drawn))
    with progress.bar(desc="wavelet packets", total=side, unit="row") as bar:
        for first in range(0, side, rows):
            taken = range(first, min(first + rows, side))
            key = f"packets of level {level} with influences, {taken}, {identity}"
            compute = functools.partial(estimates, drawn, true, size, level, taken)
            count = len(taken) * side
            found = store.kept(key, (count + len(drawn),), compute)
            packets_done.append(found[:count])
            influence += found[count:]
            bar.update(len(taken))
    return Estimate(float(np.concatenate(packets_done).mean()), (influence - influence.mean()) / side**2)


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


def estimates(
    drawn: ImageSet, true: ImageSet, size: tuple[int, int], level: int, rows: range
) -> Float64[np.ndarray, " numbers"]:
    """Returns the distance of each packet of some rows, and behind them the influences, summed over these packets.

    Args:
      size: height and width to which the images are scaled.
      level: of the packets.
      rows: rows of the transform; their moments are in memory at once.

    Raises:
      UserError: if an image cannot be read.
    """
    mine, theirs = (_moments(images, size, level, rows)[::-1] for images in (drawn, true))
    distances, derivatives = list[float](), list[Derivative]()
    while mine:
        a, b = mine.pop().gaussian(), theirs.pop().gaussian()  # the moments go as the derivatives come
        distances.append(distance(a, b))
        derivatives.append(Derivative.of(a, b))
    influences = [
        sum(of_packet(packet) for of_packet, packet in zip(derivatives, found, strict=True))
        for found in _packets(drawn, size, level, rows)
    ]
    return np.concatenate([distances, *influences])


def _moments(images: ImageSet, size: tuple[int, int], level: int, rows: range) -> list[Moments]:
    """Returns the exact moments of each packet of some rows."""
    width = 3 * size[0] * size[1] // 4**level
    found = [Moments.empty(width, step(level)) for _ in range(len(rows) * 2**level)]
    for block in _packets(images, size, level, rows):
        for moments, packet in zip(found, block, strict=True):
            moments.add(packet)
    return found


def _packets(
    images: ImageSet, size: tuple[int, int], level: int, rows: range
) -> Iterator[Iterator[Float64[np.ndarray, "n D"]]]:
    """Yields the packets of some rows, of a few images at a time."""
    scale = np.float64(step(level))
    for block in _blocks(images, size):
        yield (packet * scale for row in rows for packet in packets(block, level, row))


def _blocks(images: ImageSet, size: tuple[int, int]) -> Iterator[UInt8[np.ndarray, "n h w 3"]]:
    def read(number: int) -> UInt8[np.ndarray, "h w 3"]:
        pixels = images.pixels(number)
        if pixels.shape[:2] == size:
            return pixels
        return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC))

    with ThreadPoolExecutor(READERS) as pool:
        for first in range(0, len(images), BLOCK):
            yield np.stack(list(pool.map(read, range(first, min(first + BLOCK, len(images))))))
