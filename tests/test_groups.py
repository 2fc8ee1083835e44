"""Laws of eval's figures by group: their means, and the share of copies."""

import itertools

import numpy as np
import pytest

from arrag_jax.evaluation.measure import Shown, by_group
from arrag_jax.evaluation.memorization import are_copies


def slow_copies(grid: np.ndarray, stored: np.ndarray, least: float) -> bool:
    """The definition, over all displacements and positions."""
    height, width = grid.shape
    for image, down, right in itertools.product(stored, range(1 - height, height), range(1 - width, width)):
        moved = {(row + down, column + right): image[row, column] for row, column in np.ndindex(height, width)}
        equal = sum(moved.get(place) == grid[place] for place in np.ndindex(height, width))
        if equal >= least * height * width:
            return True
    return False


@pytest.mark.parametrize("least", [0.95, 0.6])
def test_a_copy_is_mostly_one_stored_image_at_one_displacement(least):
    rng = np.random.default_rng(1)
    stored = rng.integers(0, 50, (3, 5, 6))
    grids = np.concatenate([stored[[1, 1, 2]], rng.integers(0, 50, (2, 5, 6))])
    grids[0].flat[rng.permutation(30)[:1]] = 99  # 29 of 30
    grids[1].flat[rng.permutation(30)[:2]] = 99  # 28 of 30
    grids[3, 1:] = stored[0, :-1]  # moved down by one
    grids[4, :, :-2] = stored[0, :, 2:]  # moved to the left by two: 20 of 30
    expected = [slow_copies(grid, stored, least) for grid in grids]
    assert expected == [True, least < 0.9, True, least < 0.8, least < 0.65]
    assert are_copies(grids, stored, least).tolist() == expected


def test_each_group_has_the_mean_of_its_own_prompts_and_examples():
    bits = {"plain": np.array([1.0, 2.0, 3.0, 10.0])}
    verdicts = np.array([[1, 0, 0], [1, 1, 0]], float)
    figures = by_group(
        bits,
        {"true": Shown({}, verdicts), "plain": Shown({}, verdicts, verdicts > 2)},
        ["seen", "unseen", "seen", None],
        ["seen", "unseen", None],
        {"unseen": "unseen_taught"},
    )["plain"]
    means = {name: {group: interval["mean"] for group, interval in row.items()} for name, row in figures.items()}
    assert means == {
        "bits": {"seen": 2.0, "unseen_taught": 2.0},
        "score": {"seen": 1.0, "unseen_taught": 0.5},
        "copied": {"seen": 0.0, "unseen_taught": 0.0},
    }
