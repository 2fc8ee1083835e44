"""Laws of the guard against copies: exactly the codes that make a run too large are forbidden, whatever draws."""

import jax.numpy as jnp
import numpy as np
import pytest

from arrag_jax.decode.loop import sample
from arrag_jax.decode.policies import Daid, Plain
from arrag_jax.errors import UserError
from arrag_jax.evaluation.memorization import copied_runs
from arrag_jax.ops.sampling import without
from arrag_jax.retrieval.guard import CopyIndex
from arrag_jax.retrieval.stored_codes import StoredCodes
from helpers import tiny

MOST = 3


def largest_run(grid, stored) -> int:
    """The most different codes in a run of any stored image at any displacement."""
    height, width = grid.shape
    shifts = [(down - height + 1, right - width + 1) for down, right in np.ndindex(2 * height - 1, 2 * width - 1)]
    sizes = [0]
    for shift in shifts:
        runs = copied_runs(grid, stored, np.tile(shift, (len(stored), 1)), 1)
        sizes += [len(np.unique(grid[run])) for run in runs]
    return max(sizes)


@pytest.mark.slow
@pytest.mark.parametrize("most", [1, 2, 4])
def test_exactly_the_codes_that_make_a_run_too_large_are_forbidden(most):
    """The oracle draws every code and measures all runs of what was drawn so far."""
    rng, codes = np.random.default_rng(most), 7
    stored = np.minimum(rng.geometric(0.3, (6, 3, 4)) - 1, codes - 1)
    index, met = CopyIndex(stored.astype(np.uint16), codes, most), 0
    for trial in range(2):
        picture = stored[trial].copy().reshape(-1)
        picture[rng.integers(0, 12, 3)] = rng.integers(0, codes, 3)
        for position in range(1, 12):
            drawn = np.where(np.arange(12) < position, picture, -2)  # -1 is what lies beside a displaced image
            found = index.forbidden(drawn[None].astype(np.int32), np.array([position], np.int32))[0]
            if largest_run(drawn.reshape(3, 4), stored) > most:
                break  # a picture that is past the bound already never occurs
            for code in range(codes):
                extended = drawn.copy()
                extended[position] = code
                assert found[code] == (largest_run(extended.reshape(3, 4), stored) > most)
            met += found.sum()
    assert met


@pytest.fixture(scope="module")
def model():
    return tiny.janus()


@pytest.fixture(scope="module")
def own(model):
    """What plain draws for these prompts and seeds: stored images that would be copied whole."""
    ids, mask = tiny.prompts((6, 3))
    return np.asarray(sample(model, ids, prompt_mask=mask, seed=4).codes).reshape(2, 4, 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "window"),
    [(Plain(), 1), (Plain(), 6), (Daid(1.0, 0.5), 1)],
    ids=["plain", "window", "daid alone"],
)
def test_no_run_is_larger_than_it_may_be(model, own, policy, window):
    """With a weight of 1, DAiD draws retrieved codes alone; where all of them are forbidden, the model's remain."""
    ids, mask = tiny.prompts((6, 3))
    settings = {"prompt_mask": mask, "seed": 4, "stored": StoredCodes.of(own, 9), "max_copied_cells": MOST}
    drawn = sample(model, ids, policy, tiny.store(model), window=window, **settings)
    for grid in np.asarray(drawn.codes).reshape(-1, 4, 5):
        assert largest_run(grid, own) <= MOST
    assert largest_run(own[0], own) > MOST
    assert np.isfinite(drawn.log_p).all()
    if window > 1:
        alone = sample(model, ids, policy, **settings)
        np.testing.assert_array_equal(drawn.codes, alone.codes)


def test_a_bound_that_is_never_reached_changes_nothing(model, own):
    ids, mask = tiny.prompts((6, 3))
    guarded = sample(model, ids, prompt_mask=mask, seed=4, stored=StoredCodes.of(own, 9), max_copied_cells=9)
    np.testing.assert_array_equal(guarded.codes, own.reshape(2, -1))


@pytest.mark.slow
def test_what_is_left_is_renormalised_and_never_nothing():
    log_p = jnp.log(jnp.array([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5]]))
    forbidden = jnp.array([[False, True, False], [True, False, False], [False, False, False]])
    rest = without(log_p, jnp.log(jnp.array([[1.0, 1, 1], [6, 3, 1], [1, 1, 1]])), forbidden)
    np.testing.assert_allclose(np.exp(rest[:2]), [[2 / 3, 0, 1 / 3], [0, 0.75, 0.25]], atol=1e-6)
    np.testing.assert_array_equal(rest[2], log_p[2])


def test_a_guard_without_images_is_refused(model):
    with pytest.raises(UserError, match="max_copied_cells needs the stored images"):
        sample(model, tiny.prompts((3,))[0], max_copied_cells=4)
    with pytest.raises(UserError, match="max_copied_cells = 0 must be at least 1"):
        sample(model, tiny.prompts((3,))[0], max_copied_cells=0)
