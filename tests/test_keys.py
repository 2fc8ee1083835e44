"""Every kind of key keeps to what ``KeyKind`` says: records, keys, queries, scores and their bounds."""

import jax.numpy as jnp
import numpy as np
import pytest

from arrag_jax.errors import UserError
from arrag_jax.ops import grid as grid_ops
from arrag_jax.ops.distances import host_distances
from arrag_jax.ops.keys import KEY_KINDS, TOKENIZER_KINDS
from arrag_jax.ops.keys.context import unit_norm

GRID, V, C = (5, 6), 12, 8
RNG = np.random.default_rng(0)
CODEBOOK = unit_norm(RNG.normal(size=(V, C)))
GRIDS, LATENTS = RNG.integers(0, V, (7, *GRID)), RNG.normal(size=(7, *GRID, C)).astype(np.float32)
CONTEXTS = grid_ops.contexts_of_grids(GRIDS).reshape(-1, 4)
QUERIES = RNG.integers(0, V, (20, 4)).astype(np.int32)
KINDS = pytest.mark.parametrize("kind", TOKENIZER_KINDS.values(), ids=lambda kind: kind.name)


def keys_of(kind, rows: np.ndarray) -> np.ndarray:
    return kind.stored(kind.records(GRIDS, LATENTS), CODEBOOK, rows)


@KINDS
def test_records_and_keys_have_the_shapes_that_are_told(kind):
    records, rows = kind.records(GRIDS, LATENTS), RNG.integers(0, len(CONTEXTS), (3, 5))
    assert records.dtype == np.dtype(kind.dtype) and records.shape == (len(GRIDS), *kind.record_shape(GRID, C))
    keys = keys_of(kind, rows)
    assert (
        keys.dtype == np.float32 and keys.shape == (3, 5, kind.numbers(CODEBOOK.shape)) and abs(keys).max() <= 1 + 1e-6
    )
    assert kind.query(CODEBOOK, QUERIES).shape == (len(QUERIES), kind.numbers(CODEBOOK.shape))
    assert KEY_KINDS[kind.name] is kind


@KINDS
def test_equal_contexts_have_equal_keys_where_a_kind_says_so(kind):
    """Their queries, so that a key follows from its context alone."""
    keys = keys_of(kind, np.arange(len(CONTEXTS)))
    assert (keys == kind.query(CODEBOOK, CONTEXTS)).all() == kind.unique


@pytest.mark.slow
@KINDS
def test_distances_of_scores_are_within_their_bound(kind):
    """By NumPy and by XLA; and of rounded keys."""
    query, keys = kind.query(CODEBOOK, QUERIES), keys_of(kind, np.arange(len(CONTEXTS)))
    true = host_distances(query, np.broadcast_to(keys, (len(query), *keys.shape)))
    bound = kind.score_error(query, true[:, 0]).max()
    assert abs(kind.distance(kind.scores(query, keys)) - true).max() <= bound < 1e-4
    assert abs(kind.distance(kind.scores(jnp.asarray(query), jnp.asarray(keys))) - true).max() <= bound
    rounded = lambda x: jnp.asarray(x, jnp.bfloat16)  # noqa: E731
    found = kind.distance(kind.scores(rounded(query), rounded(keys)))
    codebook = jnp.asarray(CODEBOOK) if kind.unique else None
    error = kind.rounding_error(jnp.asarray(query), lambda x: rounded(x).astype(jnp.float32), codebook)
    assert (abs(found - true) <= error[:, None]).all() and error.max() < 0.1


@KINDS
def test_what_cannot_be_searched_for_and_held(kind):
    incomplete = QUERIES.copy()
    incomplete[3, 1] = -1
    assert kind.complete(incomplete).tolist() == [i != 3 for i in range(len(QUERIES))]
    for storage in kind.storages:
        kind.require_storage(storage)
    with pytest.raises(UserError, match=rf"storage='float64' .* keys='{kind.name}'"):
        kind.require_storage("float64")
