"""Defines two-sided keys: the codebook vectors of the eight neighbours of a position, of which a query may know a part.

A position that is filled between known ones has known neighbours after it, which a model that draws in raster order
cannot see. The distance is taken over the neighbours that the query knows. If it knows the four of the context alone,
it is the distance of ``CodebookKeys``, to the bit. Keys follow from the stored code grids, so every store has them.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from arrag_jax.ops import grid as grid_ops
from arrag_jax.ops.distances import BITS, LOW, exact_squares

HALF, PARTS = len(grid_ops.CONTEXT_OFFSETS), len(grid_ops.AROUND_OFFSETS)
FARTHEST = 4 << (2 * BITS - 2 * LOW)  # squared distance of opposite vectors, the largest; the high number of two


def stored(codes: Integer[np.ndarray, "n H W"]) -> Int[np.ndarray, "N 8"]:
    """Returns the neighbours' codes of all stored patches, in the order of stored rows; -1 outside of the image."""
    around = grid_ops.around_positions(*codes.shape[1:])[grid_ops.positions_with_context(*codes.shape[1:])]
    flat = codes.reshape(len(codes), -1).astype(np.int32)
    return np.where(around >= 0, flat[:, np.maximum(around, 0)], -1).reshape(-1, PARTS)


def complete(requested: Int[Array, "B 8"]) -> Bool[Array, " B"]:
    """Returns which requests can have neighbours: those with the whole context, or with a known code after it."""
    return (requested[:, :HALF] >= 0).all(1) | (requested[:, HALF:] >= 0).any(1)


def squares(
    codebook: Float[Array, "V C"], requested: Int[Array, "B 8"]
) -> tuple[Int[Array, "B 8 V1"], Int[Array, "B 8 V1"]]:
    """Returns the squared distance of each part of the queries to every code, as ``exact_squares`` does.

    It is 0 where the query does not know a code, so any code is as near. The last column is for a stored patch that
    has no such neighbour: it is as far as can be from a known code.
    """
    vectors = jnp.take(codebook, jnp.maximum(requested, 0), axis=0)
    high, low = exact_squares(vectors[:, :, None], codebook[None, None])
    known = (requested >= 0)[..., None]
    high, low = (jnp.pad(x, ((0, 0), (0, 0), (0, 1)), constant_values=y) for x, y in ((high, FARTHEST), (low, 0)))
    return jnp.where(known, high, 0), jnp.where(known, low, 0)
