"""``Neighbors``: what a search returns, and how lists of neighbours are merged."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Neighbors(NamedTuple):
    """K nearest stored patches a query, nearest first. Never NaN.

    Attributes:
      code: code that the stored patch holds at its centre; -1 where the slot is empty.
      distance: squared L2 distance of the keys; +inf where empty.
      id: stored row (see ``ops.grid``); -1 where empty.
    """

    code: Int[Array | np.ndarray, "B K"]
    distance: Float[Array | np.ndarray, "B K"]
    id: Int[Array | np.ndarray, "B K"]


def empty_neighbors(batch: int, k: int) -> Neighbors:
    """Neighbours of nothing: every slot empty."""
    none = jnp.full((batch, k), -1, jnp.int32)
    return Neighbors(none, jnp.full((batch, k), jnp.inf, jnp.float32), none)


def merge_neighbors(parts: Neighbors, k: int) -> Neighbors:
    """The k nearest of S lists.

    Args:
      parts: Neighbors whose arrays are [S, B, K] (one search a shard); empty slots sort last.
      k: slots to keep; fewer candidates leave empty slots.
    """
    flat = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1), parts)
    short = k - flat.code.shape[1]
    if short > 0:
        pad = empty_neighbors(flat.code.shape[0], short)
        flat = jax.tree.map(lambda x, y: jnp.concatenate([x, y], 1), flat, pad)
    distance, order = jax.lax.top_k(-flat.distance, k)
    return Neighbors(jnp.take_along_axis(flat.code, order, 1), -distance, jnp.take_along_axis(flat.id, order, 1))
