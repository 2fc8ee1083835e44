"""Defines ``Neighbors``, the result of a search, and merges such results."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Neighbors(NamedTuple):
    """The K nearest stored patches of each query, nearest first. A slot without a patch is empty.

    Attributes:
      code: the code at the patch's centre; -1 in an empty slot.
      distance: squared L2 distance of the keys; +inf in an empty slot, never NaN.
      id: number of the stored row (see ``ops.grid``); -1 in an empty slot.
    """

    code: Int[Array | np.ndarray, "B K"]
    distance: Float[Array | np.ndarray, "B K"]
    id: Int[Array | np.ndarray, "B K"]


def empty_neighbors(batch: int, k: int) -> Neighbors:
    """Returns neighbours in which every slot is empty."""
    none = jnp.full((batch, k), -1, jnp.int32)
    return Neighbors(none, jnp.full((batch, k), jnp.inf, jnp.float32), none)


def merge_neighbors(parts: Neighbors, k: int) -> Neighbors:
    """Returns the k nearest neighbours among the results of S searches.

    Args:
      parts: Neighbors with arrays [S, B, K], one search per shard. Empty slots sort last.
      k: number of slots in the result; slots stay empty if there are fewer neighbours.
    """
    flat = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1), parts)
    short = k - flat.code.shape[1]
    if short > 0:
        pad = empty_neighbors(flat.code.shape[0], short)
        flat = jax.tree.map(lambda x, y: jnp.concatenate([x, y], 1), flat, pad)
    distance, order = jax.lax.top_k(-flat.distance, k)
    return Neighbors(jnp.take_along_axis(flat.code, order, 1), -distance, jnp.take_along_axis(flat.id, order, 1))
