"""A copy audit: how much of a drawn picture comes in a run from one stored image.

A *run* is a set of cells of the picture, joined by their sides, that equal the cells of one stored image at one
displacement, and that hold at least ``RUN`` different codes: a flat ground, which equals that of any image, is no copy.
"""

import numpy as np
from jaxtyping import Bool, Int, Integer

RUN = 8  # different codes; a sprite of emoji_scenes has 16 cells, a square of 3 x 3 cells up to 9
BLOCK_IMAGES = 4096  # stored images compared at once


def copied_runs(
    grid: Integer[np.ndarray, "H W"],
    stored: Integer[np.ndarray, "M H W"],
    shift: Int[np.ndarray, "M 2"],
    least: int = RUN,
) -> Bool[np.ndarray, "R H W"]:
    """The picture's runs from any of M stored images, as masks of its cells; they may overlap.

    Args:
      grid: the picture's codes.
      stored: the images' codes.
      shift: rows and columns by which each image is moved before it is laid over the picture.
      least: different codes that make cells a run.
    """
    runs = [np.zeros((0, *grid.shape), bool)]
    for codes, (down, right) in zip(stored, shift, strict=True):
        equal = grid == _moved(codes, int(down), int(right))
        while len(np.unique(grid[equal])) >= least:  # else no part of it is a run
            part = _joined(equal, divmod(int(equal.argmax()), equal.shape[1]))
            if len(np.unique(grid[part])) >= least:
                runs.append(part[None])
            equal &= ~part
    return np.concatenate(runs)


def equal_in_place(grid: Integer[np.ndarray, "H W"], stored: Integer[np.ndarray, "n H W"]) -> Int[np.ndarray, " n"]:
    """How many cells of the picture each stored image has at the same place."""
    starts = range(0, len(stored), BLOCK_IMAGES)
    return np.concatenate([(stored[i : i + BLOCK_IMAGES] == grid[None]).sum((1, 2)) for i in starts])


def _moved(codes: Integer[np.ndarray, "H W"], down: int, right: int) -> Int[np.ndarray, "H W"]:
    """An image's codes moved down and to the right; -1 where none of its cells comes to lie."""
    moved = np.full(codes.shape, -1)
    (height, width), rows, columns = codes.shape, max(down, 0), max(right, 0)
    part = codes[max(-down, 0) : max(height - rows, 0), max(-right, 0) : max(width - columns, 0)]
    moved[rows : rows + part.shape[0], columns : columns + part.shape[1]] = part
    return moved


def _joined(equal: Bool[np.ndarray, "H W"], start: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    """The cells of ``equal`` that are joined by their sides with one of them."""
    part, edge = np.zeros_like(equal), [start]
    while edge:
        row, column = edge.pop()
        if 0 <= row < equal.shape[0] and 0 <= column < equal.shape[1] and equal[row, column] and not part[row, column]:
            part[row, column] = True
            edge += [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
    return part
