"""Where two different codes lie side by side in stored images, at every displacement of these.

Each displaced image has one number, and each stored position one place in the *canvas*. The code that the displaced
image n has at a cell of the picture stands at ``n + shift[cell]`` in the canvas. The canvas holds as many empty places
around each image as a displacement can reach, so this needs no bounds; what lies outside of an image is V.
"""

import numpy as np
from jaxtyping import Int, Integer


class Pairs:
    """The canvas of M stored images, and the places of their pairs.

    Attributes:
      grid: height and width in codes.
      size: V.
      displaced: number of displaced images.
      shift: [T], where the codes at each cell of the picture stand, from the numbers on.
      beside: the cells that share a side with each cell.
    """

    def __init__(self, codes: Integer[np.ndarray, "M H W"], codebook_size: int):
        height, width = self.grid = codes.shape[1:]
        self.size, across = codebook_size, 2 * width - 1
        each = (2 * height - 1) * across
        self.displaced = len(codes) * each
        cell = np.arange(height)[:, None] * across + np.arange(width)
        self.shift = (cell - (each - 1) // 2).reshape(-1)
        first = np.arange(len(codes))[:, None, None] * each
        self._canvas = np.full(self.displaced, codebook_size, np.uint16 if codebook_size < 2**16 else np.int32)
        self._canvas[first + cell] = codes
        self.beside = [_beside(i, height, width) for i in range(height * width)]
        large = max(2 * codebook_size**2, self.displaced) >= 2**31
        known = codes.astype(np.int64 if large else np.int32)
        place, keys, places = np.broadcast_to(first + cell, known.shape), [], []
        for down, before, after in ((0, np.s_[:, :, :-1], np.s_[:, :, 1:]), (1, np.s_[:, :-1], np.s_[:, 1:])):
            other = known[before] != known[after]
            keys.append(self._key(known[before], known[after], down)[other])
            places.append(place[after][other].astype(known.dtype))
        ordered, held = np.concatenate(keys), np.concatenate(places)
        order = np.argsort(ordered, kind="stable")
        ordered, self._places = ordered[order], held[order]
        starts = np.flatnonzero(np.diff(ordered, prepend=-1))
        self._keys, self._starts = ordered[starts], np.append(starts, len(ordered))

    def _key(self, before, after, down):
        return (down * self.size + before) * self.size + after

    def places(self, cell: int, code: int, other: int, of: int) -> Int[np.ndarray, " m"]:
        """Returns the numbers of the displaced images that hold two different codes, at a cell and at one beside it."""
        if cell < other:
            cell, code, other, of = other, of, cell, code
        key = self._key(of, code, int(cell - other > 1 or self.grid[1] == 1))
        at = self._keys.searchsorted(self._keys.dtype.type(key))
        if at == len(self._keys) or self._keys[at] != key:
            return np.zeros(0, np.intp)
        return np.subtract(self._places[self._starts[at] : self._starts[at + 1]], self.shift[cell], dtype=np.intp)

    def codes(self, numbers: Int[np.ndarray, "*n"], cell: int) -> Integer[np.ndarray, "*n"]:
        """Returns the codes that displaced images have at a cell of the picture; V outside of the image."""
        return self._canvas.take(numbers + self.shift[cell], mode="wrap")

    def all_codes(self, numbers: Int[np.ndarray, " n"]) -> Integer[np.ndarray, "n T"]:
        """Returns the same at all cells."""
        return self._canvas.take(numbers[:, None] + self.shift, mode="wrap")


def _beside(cell: int, height: int, width: int) -> tuple[int, ...]:
    row, column = divmod(cell, width)
    sides = ((column > 0, -1), (row > 0, -width), (column < width - 1, 1), (row < height - 1, width))
    return tuple(cell + step for inside, step in sides if inside)
