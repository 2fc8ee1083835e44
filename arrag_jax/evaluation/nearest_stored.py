"""Finds the stored image that an image has most in common with, wherever the common part lies in the two.

Images vote for stored images by their *blocks*, 2 x 2 codes: a block that both hold is a vote for this stored image at
this displacement. Blocks of plain areas, which have fewer than ``TELLING`` different codes, have no vote. A block that
one image holds more than ``REPEATS`` times has none either: in a texture it does not say where it was copied from.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Integer, UInt64

from arrag_jax.evaluation.memorization import moved

TELLING = 3
REPEATS = 4
VOTES = 2**22  # votes that are counted at once; the memory for them is about 0.3 GB


class Nearest(NamedTuple):
    """The stored image nearest to each of n images.

    Attributes:
      number: number of the stored image; -1 = no stored image has a vote.
      shift: rows and columns by which the stored image is moved.
      share: share of the image's codes that equal those of the moved image.
      covered: share of the image's positions that the moved image covers.
    """

    number: Int[np.ndarray, " n"]
    shift: Int[np.ndarray, "n 2"]
    share: Float[np.ndarray, " n"]
    covered: Float[np.ndarray, " n"]


def nearest_stored(grids: Integer[np.ndarray, "n H W"], chunks: Iterable[Integer[np.ndarray, "_ H W"]]) -> Nearest:
    """Returns the stored image with most votes for each image, over all displacements.

    The stored images are read once, so that their number costs no memory. Of equal numbers of votes, the first stored
    image counts, moved up and to the left the furthest.

    Args:
      grids: codes of the images, below 2^16.
      chunks: codes of the stored images, in order.
    """
    count, (height, width) = len(grids), grids.shape[1:]
    blocks, first = _Blocks.of(grids), 0
    votes, number, shift = np.zeros(count, np.int64), np.full(count, -1), np.zeros((count, 2), np.int64)
    share, covered = np.zeros(count), np.zeros(count)
    for stored in chunks:
        for image, found, where, most in blocks.votes_for(stored):
            better = most > votes[image]
            image, found, where = image[better], found[better], where[better]
            votes[image], number[image], shift[image] = most[better], first + found, where
            for i, m, (down, right) in zip(image.tolist(), found.tolist(), where.tolist(), strict=True):
                share[i] = (grids[i] == moved(stored[m], down, right)).mean()
                covered[i] = (height - abs(down)) * (width - abs(right)) / (height * width)
        first += len(stored)
    return Nearest(number, shift, share, covered)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """The blocks of images that have a vote, in the order of their values.

    Attributes:
      known: each value once.
      starts: where the blocks of each value begin in ``image`` and ``place``; the last number is their end.
      image, place: the image of each block, and its row and column in it.
    """

    known: UInt64[np.ndarray, " u"]
    starts: Int[np.ndarray, " u+1"]
    image: Int[np.ndarray, " b"]
    place: Int[np.ndarray, "b 2"]
    grid: tuple[int, int]

    @classmethod
    def of(cls, grids: Integer[np.ndarray, "n H W"]) -> "_Blocks":
        """Returns the blocks of images."""
        value, image, place = _telling(grids)
        order = np.lexsort((image, value))
        value, image, place = value[order], image[order], place[order]
        first = _first(value, image)
        times = np.diff(np.append(first, len(value)))
        few = np.repeat(times, times) <= REPEATS
        value, image, place = value[few], image[few], place[few]
        first = _first(value)
        return cls(value[first], np.append(first, len(value)), image, place, grids.shape[1:])

    def votes_for(
        self, stored: Integer[np.ndarray, "m H W"]
    ) -> Iterator[tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"], Int[np.ndarray, "k 2"], Int[np.ndarray, " k"]]]:
        """Yields, for a few stored images at a time, the one with most votes of each image that has any.

        These are the number of the image, that of the stored one, its displacement, and the number of votes.
        """
        if not len(self.known):
            return
        value, of, place = _telling(stored)
        slot = np.minimum(np.searchsorted(self.known, value), len(self.known) - 1)
        hit = self.known[slot] == value
        of, place, slot = of[hit], place[hit], slot[hit]
        total = np.cumsum(self.starts[slot + 1] - self.starts[slot])
        start = 0
        while start < len(of):
            before = total[start - 1] if start else 0
            end = int(np.searchsorted(total, before + VOTES, "right"))
            if end < len(of):  # a stored image is never divided
                end = int(np.searchsorted(of, of[end], "left"))
                end = end if end > start else int(np.searchsorted(of, of[start], "right"))
            yield self._counted(of[start:end], place[start:end], slot[start:end])
            start = end

    def _counted(
        self, of: Int[np.ndarray, " h"], place: Int[np.ndarray, "h 2"], slot: Int[np.ndarray, " h"]
    ) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"], Int[np.ndarray, "k 2"], Int[np.ndarray, " k"]]:
        """Returns the result of ``votes_for`` for the blocks of some stored images; ``slot`` is each one's value."""
        (height, width), low, wide = self.grid, int(of[0]), int(of[-1] - of[0] + 1)
        many = self.starts[slot + 1] - self.starts[slot]
        theirs = np.repeat(np.arange(len(of)), many)
        mine = np.arange(len(theirs)) + np.repeat(self.starts[slot] - np.cumsum(many) + many, many)
        down, right = (self.place[mine] - place[theirs]).T
        key = (self.image[mine] * wide + of[theirs] - low) * (2 * height) + down + height
        keys, votes = np.unique(key * (2 * width) + right + width, return_counts=True)
        image = keys // (4 * height * width * wide)
        first = _first(image)
        most = np.repeat(np.maximum.reduceat(votes, first), np.diff(np.append(first, len(image))))
        best = np.flatnonzero(votes == most)
        best = best[_first(image[best])]
        rest, right = np.divmod(keys[best], 2 * width)
        rest, down = np.divmod(rest, 2 * height)
        return image[best], rest % wide + low, np.stack([down - height, right - width], 1), votes[best]


def _first(*columns: Integer[np.ndarray, " b"]) -> Int[np.ndarray, " u"]:
    """Returns the places at which sorted rows differ from the row before, with the first one."""
    new = np.zeros(len(columns[0]), bool)
    new[:1] = True
    for column in columns:
        new[1:] |= column[1:] != column[:-1]
    return np.flatnonzero(new)


def _telling(
    grids: Integer[np.ndarray, "n H W"],
) -> tuple[UInt64[np.ndarray, " b"], Int[np.ndarray, " b"], Int[np.ndarray, "b 2"]]:
    """Returns the blocks with ``TELLING`` different codes: their codes as one number, image, and row and column."""
    corners = [
        part.astype(np.uint64) for rows in (grids[:, :-1], grids[:, 1:]) for part in (rows[..., :-1], rows[..., 1:])
    ]
    value, different = np.zeros(corners[0].shape, np.uint64), np.zeros(corners[0].shape, np.int8)
    for i, corner in enumerate(corners):
        value = (value << np.uint64(16)) | corner
        different += _is_new(corner, corners[:i])
    image, row, column = np.nonzero(different >= TELLING)
    return value[image, row, column], image, np.stack([row, column], 1)


def _is_new(corner: np.ndarray, others: list[np.ndarray]) -> Bool[np.ndarray, "n h w"]:
    new = np.ones(corner.shape, bool)
    for other in others:
        new &= corner != other
    return new
