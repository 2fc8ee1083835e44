"""Laws of the search that leaves out what would continue a copy."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrag_jax.ops.keys.hidden import SURPRISE_STEP
from arrag_jax.ops.neighbors import Neighbors
from arrag_jax.retrieval.copies import COPIED, LEAST, UncopiedRetriever

GRID, STORED = (30, 40), 4
CELLS = GRID[0] * GRID[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """A search with a given result."""

    found: Any
    k: int = dataclasses.field(metadata={"static": True})

    def search_states(self, state, drawn, position):
        return self.found


def slow_share(drawn, codes, surprise, image, place, position) -> float:
    """The part of an image's bits that the picture repeats where the image's ``place`` lies on ``position``."""
    down, right = position // GRID[1] - place // GRID[1], position % GRID[1] - place % GRID[1]
    if (GRID[0] - abs(down)) * (GRID[1] - abs(right)) < COPIED * CELLS:
        return 0.0
    bits = np.maximum(surprise[image] * SURPRISE_STEP, LEAST)
    repeated = 0.0
    for cell in range(position):
        row, column = cell // GRID[1] - down, cell % GRID[1] - right
        if 0 <= row < GRID[0] and 0 <= column < GRID[1] and drawn[cell] == codes[image, row * GRID[1] + column]:
            repeated += bits[row * GRID[1] + column]
    return repeated / bits.sum()


@pytest.mark.slow
def test_neighbours_whose_image_has_a_share_of_the_picture_are_left_out():
    """Of pictures that begin as a stored one, in place or moved by one column; the rest stays, nearest first."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 500, (STORED, CELLS)).astype(np.uint16)
    surprise = (rng.random((STORED, CELLS)) < 0.2).astype(np.uint8) * rng.integers(1, 255, (STORED, CELLS), np.uint8)
    position = np.array([300, 700, 900, 700], np.int32)
    moved = np.roll(codes[2].reshape(GRID), 1, 1).reshape(-1)
    drawn = np.stack([codes[1], codes[1], moved, codes[3]]).astype(np.int32)
    drawn[3, ::3] = 501
    image = np.where(rng.random((4, 40)) < 0.6, [[1], [1], [2], [3]], rng.integers(0, STORED, (4, 40)))
    place = position[:, None] - rng.choice([0, 1, 41, -3 * GRID[1]], (4, 40), p=[0.4, 0.4, 0.1, 0.1])
    distance = np.sort(rng.random((4, 40)), 1).astype(np.float32)
    found = Neighbors(*map(jnp.asarray, (codes[image, place].astype(np.int32), distance, image * CELLS + place)))
    asked = jnp.zeros((4, 2)), jnp.asarray(drawn), jnp.asarray(position)
    retriever = UncopiedRetriever(Given(found, 40), jnp.asarray(codes), jnp.asarray(surprise), jnp.float32(0.4), GRID)
    rest = jax.tree.map(np.asarray, retriever.search_states(*asked))
    shares = np.zeros((4, 40))
    for b, k in np.ndindex(4, 40):
        shares[b, k] = slow_share(drawn[b], codes, surprise, image[b, k], place[b, k], position[b])
    assert 0.1 < (shares >= 0.4).mean() < 0.6 and abs(shares - 0.4).min() > 1e-4
    for b in range(4):
        stays = np.flatnonzero(shares[b] < 0.4)
        np.testing.assert_array_equal(rest.id[b, : len(stays)], np.asarray(found.id)[b, stays])
        np.testing.assert_array_equal(rest.distance[b, : len(stays)], distance[b, stays])
        assert (rest.id[b, len(stays) :] == -1).all() and (rest.code[b, len(stays) :] == -1).all()
        assert np.isinf(rest.distance[b, len(stays) :]).all()
    all_of_them = dataclasses.replace(retriever, most=jnp.float32(1.1)).search_states(*asked)
    jax.tree.map(np.testing.assert_array_equal, all_of_them, found)
