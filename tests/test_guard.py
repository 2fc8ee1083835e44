"""Laws of the guard against copies: exactly the codes that make a run too large are forbidden, whatever draws."""

import jax.numpy as jnp
import numpy as np
import pytest

from arrag_jax.decode.loop import sample
from arrag_jax.decode.policies import Daid, Plain
from arrag_jax.errors import UserError
from arrag_jax.evaluation.memorization import copied_runs
from arrag_jax.ops.sampling import without
from arrag_jax.retrieval import guard
from arrag_jax.retrieval.guard import CopyIndex
from arrag_jax.retrieval.stored_codes import StoredCodes
from helpers import tiny

MOST = 3


def largest_run(grid, stored, position=None) -> int:
    """The most different codes in a run of any stored image at any displacement, of those that hold the position."""
    height, width = grid.shape
    shifts = [(down - height + 1, right - width + 1) for down, right in np.ndindex(2 * height - 1, 2 * width - 1)]
    sizes = [0]
    for shift in shifts:
        runs = copied_runs(grid, stored, np.tile(shift, (len(stored), 1)), 1)
        sizes += [len(np.unique(grid[run])) for run in runs if position is None or run.reshape(-1)[position]]
    return max(sizes)


def pictures(rng, stored, codes, number):
    """Stored images with a few other codes, some of them moved."""
    for trial in range(number):
        picture = np.roll(stored[trial % len(stored)], trial // 2, axis=1).reshape(-1).copy()
        picture[rng.integers(0, 12, 3)] = rng.integers(0, codes, 3)
        yield picture


@pytest.mark.slow
@pytest.mark.parametrize(
    ("most", "hidden"), [(1, 12), (2, 12), (4, 12), (5, 12), (2, 6), (5, 6)], ids=lambda number: str(number)
)
def test_exactly_the_codes_that_make_a_run_too_large_are_forbidden(most, hidden, monkeypatch):
    """The oracle draws every code and measures all runs of it with what was known and drawn so far."""
    monkeypatch.setattr(guard, "COMMON", 2)  # so that pairs are skipped, and counted twice
    monkeypatch.setattr(guard, "EARLIER", 1)
    rng, codes = np.random.default_rng(most), 8
    stored = np.minimum(rng.geometric(0.25, (4, 3, 4)) - 1, codes - 1)
    index, met = CopyIndex(stored.astype(np.uint16), codes, most), 0
    for picture in pictures(rng, stored, codes, 2):
        known = picture.copy()
        known[rng.permutation(12)[:hidden]] = -1
        for position in np.flatnonzero(known < 0).tolist():
            # -1 is what lies beside a displaced image
            drawn = np.where((np.arange(12) < position) | (known >= 0), picture, -2)
            given = (known[None],) if hidden < 12 else ()
            found = index.forbidden(np.where(np.arange(12) < position, picture, -2)[None], np.array([position]), *given)
            for code in range(codes):
                extended = drawn.copy()
                extended[position] = code
                assert found[0, code] == (largest_run(extended.reshape(3, 4), stored, position) > most)
            met += found.sum()
    assert met


def test_what_an_index_was_asked_before_changes_no_answer():
    """Pictures come and go, several at once and at several positions, with known codes and without."""
    rng, codes, most = np.random.default_rng(0), 12, 4
    stored = np.minimum(rng.geometric(0.2, (40, 3, 4)) - 1, codes - 1)
    index, met = CopyIndex(stored, codes, most), 0
    made = list(pictures(rng, stored, codes, 6))
    for turn in range(60):
        rows = [made[i] for i in rng.integers(0, 6, rng.integers(1, 4))]
        start, width = rng.integers(0, 9), rng.integers(1, 4)
        drawn = np.repeat(np.stack(rows), width, axis=0)
        position = np.tile(start + np.arange(width), len(rows))
        known = np.where(rng.random(12) < 0.3, drawn, -1) if turn % 3 == 0 else None
        found = index.forbidden(drawn, position, known)
        for row, own in enumerate(found):
            given = None if known is None else known[row : row + 1]
            fresh = CopyIndex(stored, codes, most).forbidden(drawn[row : row + 1], position[row : row + 1], given)
            np.testing.assert_array_equal(own, fresh[0])
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


@pytest.mark.slow
@pytest.mark.parametrize("window", [1, 6])
def test_no_run_grows_from_codes_that_are_known(model, own, window):
    """The known codes are a stored image's, so they are a run of any size; no drawn code belongs to one so large."""
    ids, mask = tiny.prompts((6, 3))
    known = np.where(np.random.default_rng(0).random((2, 20)) < 0.6, own.reshape(2, -1), -1)
    settings = {"prompt_mask": mask, "seed": 4, "known": known, "window": window}
    free = sample(model, ids, **settings)
    np.testing.assert_array_equal(free.codes, own.reshape(2, -1))
    drawn = np.asarray(sample(model, ids, stored=StoredCodes.of(own, 9), max_copied_cells=MOST, **settings).codes)
    np.testing.assert_array_equal(drawn[known >= 0], known[known >= 0])
    for codes, given in zip(drawn, known, strict=True):
        sizes = [largest_run(codes.reshape(4, 5), own, position) for position in np.flatnonzero(given < 0)]
        assert max(sizes) <= MOST


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
