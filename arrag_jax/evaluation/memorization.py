"""Measures copies: how much of a generated image equals one stored image over connected positions.

A *run* is a set of positions that are connected by their sides and whose codes equal those of one stored image at one
displacement. It holds at least ``RUN`` different codes. A plain background does not count as a copy, because it
equals the background of any image.
"""

import numpy as np
from jaxtyping import Bool, Int, Integer

from arrag_jax.retrieval.copies import COPIED

RUN = 8  # different codes; a sprite of emoji_scenes covers 16 positions, and 3 x 3 positions hold up to 9 codes
BLOCK_IMAGES = 4096  # stored images that are compared at once


def copied_runs(
    grid: Integer[np.ndarray, "H W"],
    stored: Integer[np.ndarray, "M H W"],
    shift: Int[np.ndarray, "M 2"],
    least: int = RUN,
) -> Bool[np.ndarray, "R H W"]:
    """Returns the image's runs from any of M stored images, as masks over the positions; they may overlap.

    Args:
      grid: codes of the image.
      stored: codes of the stored images.
      shift: rows and columns by which each stored image is moved before the comparison.
      least: minimum number of different codes in a run.
    """
    runs = [np.zeros((0, *grid.shape), bool)]
    for codes, (down, right) in zip(stored, shift, strict=True):
        equal = grid == moved(codes, int(down), int(right))
        while len(np.unique(grid[equal])) >= least:  # with fewer codes, no part of it is a run
            part = _joined(equal, divmod(int(equal.argmax()), equal.shape[1]))
            if len(np.unique(grid[part])) >= least:
                runs.append(part[None])
            equal &= ~part
    return np.concatenate(runs)


def equal_in_place(grid: Integer[np.ndarray, "H W"], stored: Integer[np.ndarray, "n H W"]) -> Int[np.ndarray, " n"]:
    """Returns, for each stored image, how many positions have the same code as the image."""
    starts = range(0, len(stored), BLOCK_IMAGES)
    return np.concatenate([(stored[i : i + BLOCK_IMAGES] == grid[None]).sum((1, 2)) for i in starts])


def are_copies(
    grids: Integer[np.ndarray, "n H W"], stored: Integer[np.ndarray, "M H W"], least: float = COPIED
) -> Bool[np.ndarray, " n"]:
    """Returns whether at least a share ``least`` of an image's codes are one stored image's at one displacement.

    Displacements that leave less than this share of the positions within the image need no comparison.
    """
    (height, width), copies = grids.shape[1:], np.zeros(len(grids), bool)
    for down, right in np.ndindex(2 * height - 1, 2 * width - 1):
        down, right = down - height + 1, right - width + 1
        if (height - abs(down)) * (width - abs(right)) < least * height * width:
            continue
        here = grids[:, max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)]
        there = stored[:, max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)]
        for number in np.flatnonzero(~copies):
            equal = equal_in_place(here[number], there) if len(there) else np.zeros(1)
            copies[number] = equal.max() >= least * height * width
    return copies


def moved(codes: Integer[np.ndarray, "H W"], down: int, right: int) -> Int[np.ndarray, "H W"]:
    """Returns the codes of an image moved down and to the right; -1 where no code is moved to."""
    moved = np.full(codes.shape, -1)
    (height, width), rows, columns = codes.shape, max(down, 0), max(right, 0)
    part = codes[max(-down, 0) : max(height - rows, 0), max(-right, 0) : max(width - columns, 0)]
    moved[rows : rows + part.shape[0], columns : columns + part.shape[1]] = part
    return moved


def _joined(equal: Bool[np.ndarray, "H W"], start: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    """Returns the positions of ``equal`` that are connected by their sides to ``start``."""
    part, edge = np.zeros_like(equal), [start]
    while edge:
        row, column = edge.pop()
        if 0 <= row < equal.shape[0] and 0 <= column < equal.shape[1] and equal[row, column] and not part[row, column]:
            part[row, column] = True
            edge += [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
    return part
