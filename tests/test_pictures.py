"""Laws of the figures, pixel by pixel."""

import numpy as np
import pytest

from arrag_jax.evaluation import pictures


def random_pictures(seed: int, count: int, height: int = 8, width: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def find(page: np.ndarray, part: np.ndarray) -> tuple[int, int]:
    """(row, column) of the one place where ``part`` stands in ``page``, exactly."""
    height, width = part.shape[:2]
    corners = np.argwhere((page[: -height + 1 or None, : -width + 1 or None] == part[0, 0]).all(-1))
    places = [(y, x) for y, x in corners if (page[y : y + height, x : x + width] == part).all()]
    assert len(places) == 1
    return places[0]


def test_a_tile_is_its_picture_enlarged_and_gaps_are_white():
    images = random_pictures(0, 5)
    page = pictures.grid(images, columns=3, scale=2, gap=3)
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
        pictures.grid(random_pictures(0, count), columns)


def test_labelled_pictures_stand_in_rows_and_columns():
    images = random_pictures(1, 6)
    rows = [("a cat", images[:3]), ("a caption of so many words that it needs more than a single line", images[3:])]
    page = pictures.labelled_grid(rows, ["plain", "DAiD, λ 0.1", "FAiD"], scale=3)
    places = np.array([find(page, pictures.upscale(image, 3)) for image in images]).reshape(2, 3, 2)
    assert (places[:, :, 0] == places[:, :1, 0]).all()
    assert (places[:, :, 1] == places[:1, :, 1]).all()
    assert (np.diff(places[..., 0], axis=0) > 0).all() and (np.diff(places[..., 1], axis=1) > 0).all()
    for row in range(2):  # the prompt's ink is on the left of its row
        y, x = places[row, 0]
        assert (page[y : y + 24, :x] < 100).any()
    assert (page[: places[0, 0, 0]] < 100).any()  # the titles' is above


def test_a_row_short_of_a_picture_is_refused():
    with pytest.raises(ValueError, match="3 titles"):
        pictures.labelled_grid([("a cat", random_pictures(0, 2))], ["a", "b", "c"])


@pytest.fixture
def traced() -> dict:
    """A 4 x 6 grid of 2-pixel cells: two cells from image 40, one from 7, one from 9, which the legend leaves out."""
    retrieved, source = np.zeros((4, 6), bool), np.full((4, 6), -1)
    for cell, image in {(1, 1): 40, (1, 2): 7, (3, 4): 40, (2, 3): 9}.items():
        retrieved[cell], source[cell] = True, image
    source[0, 0] = 40  # known but not drawn from: stays grey
    image = np.maximum(random_pictures(2, 1)[0] // 2, 20)
    return {"image": image, "retrieved": retrieved, "source": source, "sources": {40: image[::-1], 7: image[:, ::-1]}}


def test_a_retrieved_cell_carries_its_sources_colour(traced):
    scale = 6
    page = pictures.provenance(**traced, scale=scale, top=2)
    large = pictures.upscale(traced["image"], scale)
    y, x = find(page, large)
    x += large.shape[1] + pictures.MARGIN
    marked = page[y : y + large.shape[0], x : x + large.shape[1]]
    colors = {40: pictures.SOURCE_COLORS[0], 7: pictures.SOURCE_COLORS[1], 9: pictures.OTHER_COLOR}
    for (row, column), retrieved in np.ndenumerate(traced["retrieved"]):
        cell = marked[row * 12 : row * 12 + 12, column * 12 : column * 12 + 12]
        edge = np.concatenate([cell[0], cell[-1], cell[:, 0], cell[:, -1]])
        if retrieved:
            assert (edge == colors[int(traced["source"][row, column])]).all()
        else:
            assert (cell == cell[..., :1]).all()  # grey


def test_the_legend_frames_thumbnails_in_their_colour_most_used_first(traced):
    page = pictures.provenance(**traced, scale=20, top=2)
    legend = page[:, 2 * (pictures.MARGIN + 12 * 20) + pictures.MARGIN :]
    first, second = (np.argwhere((legend == color).all(-1)) for color in pictures.SOURCE_COLORS[:2])
    assert first[:, 0].max() < second[:, 0].min()
    for frame, source in ((first, 40), (second, 7)):
        (top, left), (bottom, right) = frame.min(0), frame.max(0)
        inside = legend[top + 3 : bottom - 2, left + 3 : right - 2]
        factor = inside.shape[0] // 8
        assert factor > 1
        np.testing.assert_array_equal(inside, pictures.upscale(traced["sources"][source], factor))


def test_nothing_retrieved_leaves_no_colour_but_the_pictures(traced):
    traced["retrieved"][:] = False
    page = pictures.provenance(**traced)
    assert not any((page == color).all(-1).any() for color in pictures.SOURCE_COLORS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"top": 7}, "top=7"),
        ({"sources": {}}, r"no thumbnail of source images \[40"),
        ({"image": np.zeros((9, 12, 3), np.uint8)}, "9 x 12"),
    ],
)
def test_provenance_says_what_is_wrong(traced, change, said):
    with pytest.raises(ValueError, match=said):
        pictures.provenance(**(traced | change))


def cell_colors(page: np.ndarray, values: np.ndarray) -> np.ndarray:
    """For each value the number of pixels of the page in exactly its colour."""
    low, high = np.nanmin(values), np.nanmax(values)
    return np.array([(page == pictures.value_color(v, low, high)).all(-1).sum() for v in values.ravel()])


def test_every_value_has_a_cell_in_its_colour_and_the_brightest_is_the_maximum():
    values = np.random.default_rng(3).permutation(np.linspace(-1, 2, 12)).reshape(3, 4)
    page = pictures.heat_map(values, ["a", "b", "c"], ["1", "2", "3", "4"], "title", "row", "column")
    assert (cell_colors(page, values) > 300).all()
    order = values.ravel().argsort()
    shades = [pictures.luminance(pictures.value_color(float(v), -1.0, 2.0)) for v in values.ravel()[order]]
    assert (np.diff(shades) > 0).all()
    y, x = np.unravel_index(values.argmax(), values.shape)
    places = np.argwhere((page == pictures.value_color(2.0, -1.0, 2.0)).all(-1)).mean(0)
    others = [
        np.argwhere((page == pictures.value_color(float(v), -1.0, 2.0)).all(-1)).mean(0) for v in values[y] if v != 2
    ]
    assert sum(places[1] > other[1] for other in others) == x


def test_a_missing_value_is_grey_and_a_constant_table_is_drawn():
    values = np.array([[1.0, np.nan], [1.0, 1.0]])
    page = pictures.heat_map(values, ["a", "b"], ["c", "d"])
    assert (cell_colors(page, values) > 300).all()
    assert pictures.value_color(np.nan, 0.0, 1.0) != pictures.value_color(1.0, 1.0, 1.0)


def test_labels_must_fit_the_values():
    with pytest.raises(ValueError, match="2 x 1 labels"):
        pictures.heat_map(np.zeros((2, 2)), ["a", "b"], ["c"])


def test_source_colours_stay_apart_for_colour_blind_readers():
    """Distances in the two planes left to dichromats (Viénot, Brettel and Mollon 1999, linear RGB)."""
    protan = np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]])
    deutan = np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]])
    linear = (np.array(pictures.SOURCE_COLORS) / 255.0) ** 2.2
    for seen_by in (np.eye(3), protan, deutan):
        seen = np.clip(linear @ seen_by.T, 0, 1) ** (1 / 2.2) * 255
        distances = np.linalg.norm(seen[:, None] - seen[None], axis=-1) + np.eye(len(seen)) * 1e9
        assert distances.min() > 30


def test_a_table_reads_back_cell_by_cell():
    text = pictures.table(["method", "score", "n"], [["plain", 0.71234, 5], ["DAiD|x", 0.9, None]])
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
        pictures.table(["a", "b"], [["x"]])
