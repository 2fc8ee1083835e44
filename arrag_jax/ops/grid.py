"""Raster geometry of a code grid: the L-shaped context of a cell, and which cells have one.

Source: docs/reference.md quirk 2 (row >= 1 and 1 <= column <= W-2) and "Datastore and search".
Stored rows are numbered image by image, and inside an image in raster order over the cells that
have a context, so that a row's number alone tells its image and its cell.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Integer

MOST_SIDE = 1024  # of a grid: what is made of a grid alone is then small
# (row, column) steps to the context cells, in the order in which a key is laid out.
CONTEXT_OFFSETS: tuple[tuple[int, int], ...] = ((-1, -1), (-1, 0), (-1, 1), (0, -1))


def positions_with_context(height: int, width: int) -> np.ndarray:
    """Raster indices of the (height-1)·(width-2) cells that have all four context cells.

    Raises:
      ValueError: if the grid is too small to hold one such cell.
    """
    positions = np.flatnonzero(has_context(height, width)).astype(np.int32)
    if not len(positions):
        raise ValueError(f"a {height} x {width} grid has no cell with a full context; at least 2 x 3 is needed")
    return positions


def has_context(height: int, width: int) -> Bool[np.ndarray, " T"]:
    """For every cell in raster order: does it have a full context? In a small grid none has."""
    mask = np.zeros((height, width), bool)
    mask[1:, 1:-1] = True
    return mask.reshape(-1)


def context_positions(height: int, width: int) -> Int[np.ndarray, "T 4"]:
    """Raster indices of each cell's context in key order; -1 in rows of cells without one."""
    positions = np.arange(height * width, dtype=np.int32)
    offsets = np.array([dr * width + dc for dr, dc in CONTEXT_OFFSETS], np.int32)
    return np.where(has_context(height, width)[:, None], positions[:, None] + offsets, -1).astype(np.int32)


def contexts_of_grids(codes: Integer[np.ndarray, "B H W"]) -> Integer[np.ndarray, "B M 4"]:
    """Context codes of every cell that has one; M = (H-1)·(W-2), stored-row order."""
    return np.stack(
        [codes[:, 1 + dr : codes.shape[1] + dr, 1 + dc : codes.shape[2] - 1 + dc] for dr, dc in CONTEXT_OFFSETS], -1
    ).reshape(codes.shape[0], -1, 4)


def next_codes_of_grids(codes: Integer[np.ndarray, "B H W"]) -> Integer[np.ndarray, "B M"]:
    """The code of every cell that has a context: what a stored patch offers."""
    return codes[:, 1:, 1:-1].reshape(codes.shape[0], -1)


def context_codes(drawn: Int[Array, "B T"], context: Int[Array, "*cells 4"]) -> Int[Array, "B *cells 4"]:
    """Codes at the four context cells of one cell, or of many (rows of ``context_positions``); -1 where it has none."""
    return jnp.where(context[None] >= 0, jnp.take(drawn, jnp.maximum(context, 0), axis=1), -1)


def image_and_position(row: Int[np.ndarray, "*n"], height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Image number and raster cell of stored rows; (-1, -1) for the empty row -1."""
    positions = positions_with_context(height, width)
    row = np.asarray(row)
    image, place = row // len(positions), row % len(positions)
    return np.where(row < 0, -1, image), np.where(row < 0, -1, positions[place])
