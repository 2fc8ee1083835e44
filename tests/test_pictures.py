"""Laws of the figures, pixel by pixel."""

import numpy as np
import pytest

from arrag_jax.figures import canvas, grids
from helpers.pixels import find, random_images


def test_a_tile_is_its_picture_enlarged_and_gaps_are_white():
    images = random_images(0, 5)
    page = grids.grid(images, columns=3, scale=2, gap=3)
    assert page.shape == (2 * 16 + 3, 3 * 24 + 2 * 3, 3)
    covered = np.zeros(page.shape[:2], bool)
    for i, image in enumerate(images):
        y, x = i // 3 * 19, i % 3 * 27
        tile = page[y : y + 16, x : x + 24]
        covered[y : y + 16, x : x + 24] = True
        for dy in range(2):
            for dx in range(2):
                np.testing.assert_array_equal(tile[dy::2, dx::2], image)
    assert (page[~covered] == 255).all()


@pytest.mark.parametrize(("count", "columns"), [(0, 2), (2, 0)])
def test_an_empty_grid_is_refused(count, columns):
    with pytest.raises(ValueError, match="at least one picture"):
        grids.grid(random_images(0, count), columns)


def test_labelled_pictures_stand_in_rows_and_columns():
    images = random_images(1, 6)
    rows = [("a cat", images[:3]), ("a caption of so many words that it needs more than a single line", images[3:])]
    page = grids.labelled_grid(rows, ["plain", "DAiD, λ 0.1", "FAiD"], scale=3)
    places = np.array([find(page, canvas.upscale(image, 3)) for image in images]).reshape(2, 3, 2)
    assert (places[:, :, 0] == places[:, :1, 0]).all()
    assert (places[:, :, 1] == places[:1, :, 1]).all()
    assert (np.diff(places[..., 0], axis=0) > 0).all() and (np.diff(places[..., 1], axis=1) > 0).all()
    for row in range(2):  # the prompt's ink is on the left of its row
        y, x = places[row, 0]
        assert (page[y : y + 24, :x] < 100).any()
    assert (page[: places[0, 0, 0]] < 100).any()  # the titles' is above


def test_a_row_short_of_a_picture_is_refused():
    with pytest.raises(ValueError, match="3 titles"):
        grids.labelled_grid([("a cat", random_images(0, 2))], ["a", "b", "c"])


def cell_colors(page: np.ndarray, values: np.ndarray) -> np.ndarray:
    """For each value the number of pixels of the page in exactly its colour."""
    low, high = np.nanmin(values), np.nanmax(values)
    return np.array([(page == canvas.value_color(v, low, high)).all(-1).sum() for v in values.ravel()])


def test_every_value_has_a_cell_in_its_colour_and_the_brightest_is_the_maximum():
    values = np.random.default_rng(3).permutation(np.linspace(-1, 2, 12)).reshape(3, 4)
    page = grids.heat_map(values, ["a", "b", "c"], ["1", "2", "3", "4"], "title", "row", "column")
    assert (cell_colors(page, values) > 300).all()
    order = values.ravel().argsort()
    shades = [canvas.luminance(canvas.value_color(float(v), -1.0, 2.0)) for v in values.ravel()[order]]
    assert (np.diff(shades) > 0).all()
    y, x = np.unravel_index(values.argmax(), values.shape)
    places = np.argwhere((page == canvas.value_color(2.0, -1.0, 2.0)).all(-1)).mean(0)
    others = [
        np.argwhere((page == canvas.value_color(float(v), -1.0, 2.0)).all(-1)).mean(0) for v in values[y] if v != 2
    ]
    assert sum(places[1] > other[1] for other in others) == x


def test_a_missing_value_is_grey_and_a_constant_table_is_drawn():
    values = np.array([[1.0, np.nan], [1.0, 1.0]])
    page = grids.heat_map(values, ["a", "b"], ["c", "d"])
    assert (cell_colors(page, values) > 300).all()
    assert canvas.value_color(np.nan, 0.0, 1.0) != canvas.value_color(1.0, 1.0, 1.0)


def test_labels_must_fit_the_values():
    with pytest.raises(ValueError, match="2 x 1 labels"):
        grids.heat_map(np.zeros((2, 2)), ["a", "b"], ["c"])


def test_a_table_reads_back_cell_by_cell():
    text = grids.table(["method", "score", "n"], [["plain", 0.71234, 5], ["DAiD|x", 0.9, None]])
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines()]
    assert lines == [
        ["method", "score", "n"],
        ["-------", "----:", "--:"],
        ["plain", "0.712", "5"],
        ["DAiD\\|x", "0.900", ""],
    ]
    assert len({len(line) for line in text.splitlines()}) == 1


def test_a_ragged_table_is_refused():
    with pytest.raises(ValueError, match="1 cells under 2 columns"):
        grids.table(["a", "b"], [["x"]])
