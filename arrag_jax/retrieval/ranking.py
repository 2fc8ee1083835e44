"""Ranks the patches of found contexts on the device, by distance and then by stored row."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer

from arrag_jax.ops.neighbors import Neighbors

NO_ROW = jnp.iinfo(jnp.int32).max


def lay_out(
    unique: Int[Array, "B n"],
    distance: Float[Array, "B n"],
    k: int,
    codes: Integer[Array, " N"],
    starts: Int[Array, " U1"] | None,
    rows: Int[Array, " N"] | None,
) -> Neighbors:
    """Expands each row of unique contexts to its first k patches, by distance and then by stored row.

    Args:
      unique: numbers of contexts, nearest first; equal distances in ascending order of number; -1 in empty slots, which
        come last.
      distance: their distances.
      k: patches per row.
      codes, starts, rows: as in ``DenseRetriever``.
    """
    short = k - unique.shape[1]
    if starts is None or rows is None:
        unique = jnp.pad(unique, ((0, 0), (0, max(0, short))), constant_values=-1)[:, :k]
        distance = jnp.pad(distance, ((0, 0), (0, max(0, short))), constant_values=jnp.inf)[:, :k]
        code = jnp.take(codes, jnp.maximum(unique, 0)).astype(jnp.int32)
        return Neighbors(jnp.where(unique < 0, -1, code), jnp.where(unique < 0, jnp.inf, distance), unique)
    first, end = (jnp.take(starts, jnp.maximum(unique, 0) + i) for i in (0, 1))
    count = jnp.where(unique >= 0, jnp.minimum(end - first, k), 0)
    nearer = jnp.cumsum(count, 1) - count
    equal = jnp.pad(distance[:, 1:] == distance[:, :-1], ((0, 0), (1, 0)))
    nearer = jax.lax.cummax(jnp.where(equal, 0, nearer), axis=1)  # number of patches at smaller distances
    count = jnp.clip(k - nearer, 0, count)  # the sum may exceed k if contexts share a distance
    ends = jnp.cumsum(count, 1)

    def slots(start: Array) -> tuple[Array, Array, Array]:
        """Returns the distances, rows and codes of the k slots from ``start`` on."""
        slot = start + jnp.arange(k)
        which = jax.vmap(lambda ends: jnp.searchsorted(ends, slot, side="right"))(ends)
        full = which < unique.shape[1]
        which = jnp.minimum(which, unique.shape[1] - 1)
        offset = slot[None] - jnp.take_along_axis(ends - count, which, 1)
        place = jnp.where(full, jnp.take_along_axis(first, which, 1) + offset, 0)
        distances = jnp.where(full, jnp.take_along_axis(distance, which, 1), jnp.inf)
        row = jnp.where(full, jnp.take(rows, place), NO_ROW)
        return distances, row, jnp.where(full, jnp.take(codes, place).astype(jnp.int32), -1)

    def merged(i: Array, best: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        both = tuple(jnp.concatenate(x, 1) for x in zip(best, slots(i * k), strict=True))
        distances, row, code = (x[:, :k] for x in jax.lax.sort(both, num_keys=2, is_stable=False))
        return distances, row, code

    best = jax.lax.sort(slots(jnp.int32(0)), num_keys=2, is_stable=False)
    distance, row, code = jax.lax.fori_loop(1, -(-ends[:, -1].max() // k), merged, tuple(best))
    return Neighbors(code, distance, jnp.where(row == NO_ROW, -1, row))


def unless(sure: Bool[Array, " B"], answer: Any, otherwise: Callable[[Any, Array], Any]) -> Any:
    """Returns ``answer`` if all rows are sure, else ``otherwise(answer, 1)``, which is computed only then.

    This is a ``while_loop``, because under ``vmap`` a ``cond`` would always compute both branches.

    Args:
      sure: which rows of the answer are certain.
      answer: the first answer.
      otherwise: computes the better answer. Its second argument is the number 1 as a traced value; ``otherwise`` must
        multiply the number of steps of its loops by it. Without this dependence XLA would move the loops out of the
        ``while_loop`` and always run them.
    """

    def settle(state: tuple[Array, Any]) -> tuple[Array, Any]:
        settled, answer = state
        return settled | True, otherwise(answer, 1 - settled.astype(jnp.int32))

    return jax.lax.while_loop(lambda state: ~state[0], settle, (sure.all(), answer))[1]
