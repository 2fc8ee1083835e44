"""Raster geometry, against its definition cell by cell."""

import jax.numpy as jnp
import numpy as np
import pytest

from arrag_jax.ops import grid

SIZES = [(2, 3), (3, 3), (4, 6), (12, 12), (24, 24)]


def naive_context(row: int, column: int, height: int, width: int) -> list[int]:
    """Raster indices of up-left, up, up-right, left; -1 four times where the context is not whole."""
    positions = [(row - 1, column - 1), (row - 1, column), (row - 1, column + 1), (row, column - 1)]
    if row < 1 or column < 1 or column > width - 2:
        return [-1] * 4
    return [r * width + c for r, c in positions]


@pytest.mark.parametrize("height, width", SIZES)
def test_contexts_by_definition(height, width):
    naive = [naive_context(r, c, height, width) for r in range(height) for c in range(width)]
    np.testing.assert_array_equal(grid.context_positions(height, width), naive)
    mask = np.array([positions[0] >= 0 for positions in naive])
    np.testing.assert_array_equal(grid.has_context(height, width), mask)
    np.testing.assert_array_equal(grid.positions_with_context(height, width), np.flatnonzero(mask))
    assert mask.sum() == (height - 1) * (width - 2)


@pytest.mark.parametrize("height, width", SIZES)
def test_a_context_is_drawn_before_its_cell(height, width):
    """Causality: no context cell comes at or after its cell in raster order."""
    context = grid.context_positions(height, width)
    assert (context < np.arange(height * width)[:, None]).all()


@pytest.mark.parametrize("height, width", SIZES)
def test_stored_rows_agree_with_the_cells(height, width):
    """Contexts and next codes of grids = codes gathered by raster index; row numbers lead back."""
    codes = np.random.default_rng(0).integers(0, 99, (3, height, width))
    positions, flat = grid.positions_with_context(height, width), codes.reshape(3, -1)
    np.testing.assert_array_equal(grid.next_codes_of_grids(codes), flat[:, positions])
    np.testing.assert_array_equal(
        grid.contexts_of_grids(codes), flat[:, grid.context_positions(height, width)[positions]]
    )
    rows = np.arange(3 * len(positions))
    image, position = grid.image_and_position(rows, height, width)
    np.testing.assert_array_equal(flat[image, position], grid.next_codes_of_grids(codes).reshape(-1))
    np.testing.assert_array_equal(grid.image_and_position(np.array([-1]), height, width), [[-1], [-1]])


def test_context_codes_of_drawn_cells():
    codes = np.random.default_rng(0).integers(0, 99, (2, 4, 6)).astype(np.int32)
    drawn, positions = jnp.asarray(codes.reshape(2, -1)), grid.context_positions(4, 6)
    stored = iter(grid.contexts_of_grids(codes).swapaxes(0, 1))
    for position in range(24):
        expected = next(stored) if positions[position, 0] >= 0 else np.full((2, 4), -1)
        np.testing.assert_array_equal(grid.context_codes(drawn, jnp.asarray(positions[position])), expected)


@pytest.mark.parametrize("height, width", [(1, 5), (5, 2)])
def test_too_small_a_grid_has_no_context_and_is_refused_for_storing(height, width):
    assert not grid.has_context(height, width).any()
    np.testing.assert_array_equal(grid.context_positions(height, width), np.full((height * width, 4), -1))
    with pytest.raises(ValueError, match=f"{height} x {width}"):
        grid.positions_with_context(height, width)
