"""Merging lists of neighbours = sorting their union."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrag_jax.ops.neighbors import Neighbors, empty_neighbors, merge_neighbors


def random_parts(shards: int, batch: int, k: int, seed: int = 0) -> Neighbors:
    """Sorted lists with distinct distances and some empty slots at their ends."""
    rng = np.random.default_rng(seed)
    distance = np.sort(rng.permutation(shards * batch * k).reshape(shards, batch, k).astype(np.float32), 2)
    filled = np.arange(k) < rng.integers(0, k + 1, (shards, batch, 1))
    id_ = rng.permutation(shards * batch * k).reshape(distance.shape)
    return Neighbors(
        jnp.asarray(np.where(filled, id_ % 7, -1), jnp.int32),
        jnp.asarray(np.where(filled, distance, np.inf), jnp.float32),
        jnp.asarray(np.where(filled, id_, -1), jnp.int32),
    )


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 4, 5, 30])  # 30: more than there are candidates
def test_merge_is_the_sorted_union(k):
    parts = random_parts(3, 5, 4)
    merged = jax.jit(merge_neighbors, static_argnums=1)(parts, k)
    for row in range(5):
        found = np.concatenate([np.stack([x[s, row] for x in parts]) for s in range(3)], 1)
        found = found[:, np.isfinite(found[1])]
        expected = found[:, np.argsort(found[1])][:, :k]
        count = expected.shape[1]
        np.testing.assert_array_equal(np.stack([x[row, :count] for x in merged]), expected)
        assert (np.asarray(merged.id[row, count:]) == -1).all()
        assert (np.asarray(merged.code[row, count:]) == -1).all()
        assert np.isposinf(merged.distance[row, count:]).all()


@pytest.mark.slow
def test_merging_in_two_steps_is_merging_at_once():
    parts = random_parts(4, 3, 5)
    halves = [merge_neighbors(jax.tree.map(lambda x, s=s: x[s], parts), 5) for s in (slice(2), slice(2, 4))]
    twice = merge_neighbors(jax.tree.map(lambda *x: jnp.stack(x), *halves), 5)
    jax.tree.map(np.testing.assert_array_equal, twice, merge_neighbors(parts, 5))


@pytest.mark.slow
def test_equal_distances_keep_their_order():
    """Earlier lists first: with shards in row order, ties stay ordered by id."""
    distance = jnp.zeros((3, 1, 2))
    id_ = jnp.arange(6, dtype=jnp.int32).reshape(3, 1, 2)
    np.testing.assert_array_equal(merge_neighbors(Neighbors(id_, distance, id_), 4).id, [[0, 1, 2, 3]])


@pytest.mark.slow
def test_empty_neighbors_are_the_identity():
    parts = random_parts(1, 3, 4)
    one = jax.tree.map(lambda x: x[0], parts)
    both = jax.tree.map(lambda x, y: jnp.stack([x, y]), one, empty_neighbors(3, 4))
    jax.tree.map(np.testing.assert_array_equal, merge_neighbors(both, 4), one)
