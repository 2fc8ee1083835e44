"""Computes the geometry of a code grid: the L-shaped context of a position, and which positions have a context.

Source: docs/reference.md quirk 2 (row >= 1 and 1 <= column <= W-2) and "Datastore and search".

A stored row is one patch of a datastore. Stored rows are numbered image by image and, within an image, in raster order
over the positions that have a context. So the number of a row determines its image and its position.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Integer

MOST_SIDE = 1024  # maximum height and width of a grid, so that arrays that depend only on the grid stay small
# (row, column) offsets of the four context positions, in the order of a key's parts.
CONTEXT_OFFSETS: tuple[tuple[int, int], ...] = ((-1, -1), (-1, 0), (-1, 1), (0, -1))
AROUND_OFFSETS = (*CONTEXT_OFFSETS, (0, 1), (1, -1), (1, 0), (1, 1))  # the same, then the four that are drawn later


def positions_with_context(height: int, width: int) -> np.ndarray:
    """Returns the raster indices of the (height-1)·(width-2) positions that have a complete context.

    Raises:
      ValueError: if the grid is so small that no position has one.
    """
    positions = np.flatnonzero(has_context(height, width)).astype(np.int32)
    if not len(positions):
        raise ValueError(f"a {height} x {width} grid has no cell with a full context; at least 2 x 3 is needed")
    return positions


def has_context(height: int, width: int) -> Bool[np.ndarray, " T"]:
    """Returns, for every position in raster order, whether it has a complete context."""
    mask = np.zeros((height, width), bool)
    mask[1:, 1:-1] = True
    return mask.reshape(-1)


def context_positions(height: int, width: int) -> Int[np.ndarray, "T 4"]:
    """Returns the raster indices of each position's context, in key order; -1 for positions without a context."""
    positions = np.arange(height * width, dtype=np.int32)
    offsets = np.array([dr * width + dc for dr, dc in CONTEXT_OFFSETS], np.int32)
    return np.where(has_context(height, width)[:, None], positions[:, None] + offsets, -1).astype(np.int32)


def around_positions(height: int, width: int) -> Int[np.ndarray, "T 8"]:
    """Returns the raster indices of each position's eight neighbours (``AROUND_OFFSETS``); -1 outside of the grid."""
    row, column = np.divmod(np.arange(height * width, dtype=np.int32)[:, None], width)
    down, right = np.array(AROUND_OFFSETS, np.int32).T
    row, column = row + down, column + right
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return np.where(inside, row * width + column, -1).astype(np.int32)


def contexts_of_grids(codes: Integer[np.ndarray, "B H W"]) -> Integer[np.ndarray, "B M 4"]:
    """Returns the context codes of the M = (H-1)·(W-2) positions that have a context, in the order of stored rows."""
    return np.stack(
        [codes[:, 1 + dr : codes.shape[1] + dr, 1 + dc : codes.shape[2] - 1 + dc] for dr, dc in CONTEXT_OFFSETS], -1
    ).reshape(codes.shape[0], -1, 4)


def next_codes_of_grids(codes: Integer[np.ndarray, "B H W"]) -> Integer[np.ndarray, "B M"]:
    """Returns the codes at the positions that have a context; these are the codes that stored patches offer."""
    return codes[:, 1:, 1:-1].reshape(codes.shape[0], -1)


def context_codes(drawn: Int[Array, "B T"], context: Int[Array, "*cells 4"]) -> Int[Array, "B *cells 4"]:
    """Returns the codes at the context of one or more positions; -1 where a position has no context.

    Args:
      context: rows of ``context_positions``.
    """
    return jnp.where(context[None] >= 0, jnp.take(drawn, jnp.maximum(context, 0), axis=1), -1)


def around_codes(
    drawn: Int[Array, "n T"], known: Int[Array, "n T"] | None, around: Int[Array, "n 8"]
) -> Int[Array, "n 8"]:
    """Returns the codes around one position of each row; -1 where there is no position, or its code is not known.

    Args:
      drawn: codes before the position. known: codes known after it, -1 where they are not; None = none is.
      around: a row of ``around_positions`` for each row.
    """
    half = len(CONTEXT_OFFSETS)
    later = jnp.full_like(drawn, -1) if known is None else known
    place = jnp.maximum(around, 0)
    codes = [jnp.take_along_axis(drawn, place[:, :half], 1), jnp.take_along_axis(later, place[:, half:], 1)]
    return jnp.where(around >= 0, jnp.concatenate(codes, 1), -1)


def image_and_position(row: Int[np.ndarray, "*n"], height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the image number and the raster index of stored rows; (-1, -1) for the empty row -1."""
    positions = positions_with_context(height, width)
    row = np.asarray(row)
    image, place = row // len(positions), row % len(positions)
    return np.where(row < 0, -1, image), np.where(row < 0, -1, positions[place])
