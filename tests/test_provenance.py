"""Where drawn codes came from: the records agree with a search of the finished grid, the audit with its definition."""

import json

import jax
import numpy as np
import pytest

from arrag_jax.decode.loop import SampleOutput, sample
from arrag_jax.decode.policies import Daid
from arrag_jax.evaluation.memorization import copied_runs, equal_in_place
from arrag_jax.evaluation.provenance import image_record
from arrag_jax.evaluation.provenance_page import OTHER_COLOR, STRONGEST, provenance_page
from arrag_jax.figures.canvas import BLUE, MARGIN, ORANGE, PALETTE, greyed, upscale
from arrag_jax.ops import grid as grid_ops
from arrag_jax.ops.grid import contexts_of_grids
from arrag_jax.retrieval.dense import DenseRetriever
from helpers import tiny
from helpers.pixels import find, random_images

SOURCES = [f"picture {i}" for i in range(40)]


def retriever_of(codes: np.ndarray, codebook: np.ndarray, k: int) -> DenseRetriever:
    keys = codebook[contexts_of_grids(codes)].reshape(-1, 4 * codebook.shape[1])
    return DenseRetriever.create(keys, grid_ops.next_codes_of_grids(codes).reshape(-1), codebook, k)


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 8, 64])
def test_records_agree_with_a_search_of_the_finished_grid(k):
    """The oracle works on the drawn picture alone: every stored patch's distance to each cell's context."""
    model = tiny.janus()
    height, width = model.grid
    codes = np.random.default_rng(3).integers(0, model.codebook_size, (40, height, width))
    codebook = np.asarray(model.codebook)
    ids, mask = tiny.prompts((4, 3))
    drawn = sample(model, ids, Daid(0.6, 0.3), retriever_of(codes, codebook, k), prompt_mask=mask, top_p=0.7)
    keys = codebook[contexts_of_grids(codes)].reshape(-1, 4 * codebook.shape[1])
    values = grid_ops.next_codes_of_grids(codes).reshape(-1)
    positions = grid_ops.positions_with_context(height, width)
    for i in range(2):
        one = jax.tree.map(lambda x, i=i: np.asarray(x[i]), drawn)
        record = json.loads(json.dumps(image_record(one, codes, SOURCES), allow_nan=False))
        grid = one.codes.reshape(1, height, width)
        away = ((codebook[contexts_of_grids(grid)[0]].reshape(len(positions), 1, -1) - keys[None]) ** 2).sum(-1)
        for place, position in enumerate(positions):
            order, said = np.argsort(away[place], kind="stable")[:k], record["cells"][position]
            hits = np.flatnonzero(values[order] == said["code"])
            assert (said["rank"] is not None) == bool(len(hits))
            if len(hits):
                assert said["distance"] == pytest.approx(away[place][order[hits[0]]], abs=1e-4)
                assert away[place][order[said["rank"]]] == pytest.approx(said["distance"], abs=1e-4)
                row = said["image"] * len(positions) + np.flatnonzero(positions == said["image_cell"])[0]
                assert values[row] == said["code"]
                assert away[place][row] == pytest.approx(said["distance"], abs=1e-4)
        outside = set(range(height * width)) - set(positions.tolist())
        assert all(record["cells"][position]["rank"] is None for position in outside)
        assert sum(position["rank"] is not None for position in record["cells"]) / grid.size == pytest.approx(
            record["share_among_neighbors"], abs=1e-4
        )


def naive_copied(grid: np.ndarray, stored: np.ndarray, shift: np.ndarray, least: int) -> np.ndarray:
    """Oracle: grows each run cell by cell from every start, by the words of the definition."""
    height, width = grid.shape

    def equal(image, move, position):
        row, column = position[0] - move[0], position[1] - move[1]
        inside = 0 <= row < height and 0 <= column < width and 0 <= position[0] < height and 0 <= position[1] < width
        return inside and image[row, column] == grid[position]

    copied = np.zeros(grid.shape, bool)
    for image, move in zip(stored, shift, strict=True):
        for start in np.ndindex(height, width):
            run, grown = set(), {start} if equal(image, move, start) else set()
            while grown != run:
                run = grown
                near = {(r + dr, c + dc) for r, c in run for dr, dc in ((0, 1), (1, 0), (0, -1), (-1, 0))}
                grown = run | {position for position in near if equal(image, move, position)}
            copied[start] |= len({int(grid[position]) for position in run}) >= least
    return copied


def test_copied_cells_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    for _ in range(12):
        grid, stored = rng.integers(0, 3, (5, 6)), rng.integers(0, 3, (4, 5, 6))
        shift = rng.integers(-3, 4, (4, 2))
        for least in (1, 2, 3):
            expected = naive_copied(grid, stored, shift, least)
            np.testing.assert_array_equal(copied_runs(grid, stored, shift, least).any(0), expected)


def test_a_whole_copy_is_one_a_random_picture_nothing_a_flat_one_no_copy():
    rng = np.random.default_rng(1)
    stored = rng.integers(0, 500, (30, 12, 12)).astype(np.uint16)
    stored[5, 2:, :] = 7  # most of it flat
    here = np.zeros((30, 2), int)
    assert copied_runs(stored[4], stored, here).any(0).all()
    assert copied_runs(stored[5], stored, here).any(0).all()  # its first rows make the whole of it a run
    assert not copied_runs(rng.integers(0, 500, (12, 12)), stored, here).any()
    flat = np.full((12, 12), 7)
    assert not copied_runs(flat, stored, here).any()
    moved = rng.integers(0, 500, (12, 12))
    moved[3:9, 4:10] = stored[8, :6, 1:7]  # a square of it, three down and three to the right
    copied = copied_runs(moved, stored, np.full((30, 2), 3)).any(0)
    assert copied[3:9, 4:10].all() and copied.sum() == 36
    np.testing.assert_array_equal(equal_in_place(stored[4], stored) == 144, np.arange(30) == 4)


def test_a_picture_drawn_from_one_stored_image_alone_is_all_copied():
    """Ties between equal contexts cannot hide it: the audit compares codes, not the origins that ties picked."""
    codes = np.tile(np.arange(9).reshape(1, 9), (3, 4))[:, :20].reshape(3, 4, 5).astype(np.uint16)  # three equal images
    grid = codes[2]
    positions = grid_ops.positions_with_context(4, 5)
    rows = np.full(20, -1)
    rows[positions] = np.random.default_rng(0).integers(0, 3, len(positions)) * len(positions) + np.arange(
        len(positions)
    )
    zeros = np.zeros(20, np.float32)
    drawn = SampleOutput(grid.reshape(-1).astype(np.int32), zeros, zeros, rows, np.where(rows < 0, -1, 0), zeros)
    record = image_record(drawn, codes, SOURCES)
    assert record["share_copied"] == record["share_largest_copy"] == record["nearest_in_place"]["share_equal"] == 1.0


@pytest.fixture
def traced() -> dict:
    """A 4 x 6 grid of 2-pixel cells: two cells from image 40, one from 7, one from 9, which the legend leaves out."""
    source, moved = np.full((4, 6), -1), np.zeros((4, 6), np.float32)
    for position, image in {(1, 1): 40, (1, 2): 7, (3, 4): 40, (2, 3): 9}.items():
        source[position] = image
    moved[1, 1], moved[1, 2], moved[3, 4], moved[2, 2] = 2.0, 1.0, np.inf, -0.5
    image = np.maximum(random_images(2, 1)[0] // 2, 20)
    sources = {40: image[::-1], 7: image[:, ::-1]}
    names = {40: "holiday/beach.jpg", 7: "00017.tar!000123.jpg"}
    return {"image": image, "source": source, "moved": moved, "sources": sources, "names": names}


def test_a_retrieved_cell_carries_its_sources_colour(traced):
    scale = 6
    page = provenance_page(**traced, scale=scale, top=2)
    large = upscale(traced["image"], scale)
    y, x = find(page, large)
    x += large.shape[1] + MARGIN
    marked = page[y : y + large.shape[0], x : x + large.shape[1]]
    colors = {40: PALETTE[0], 7: PALETTE[1], 9: OTHER_COLOR}
    for (row, column), source in np.ndenumerate(traced["source"]):
        position = marked[row * 12 : row * 12 + 12, column * 12 : column * 12 + 12]
        edge = np.concatenate([position[0], position[-1], position[:, 0], position[:, -1]])
        if source >= 0:
            assert (edge == colors[int(source)]).all()
        else:
            assert (position == position[..., :1]).all()  # grey


def test_the_legend_frames_thumbnails_in_their_colour_most_used_first(traced):
    page = provenance_page(**traced, scale=20, top=2)
    legend = page[:, 3 * (MARGIN + 12 * 20) + MARGIN :]
    first, second = (np.argwhere((legend == color).all(-1)) for color in PALETTE[:2])
    assert first[:, 0].max() < second[:, 0].min()
    for frame, source in ((first, 40), (second, 7)):
        (top, left), (bottom, right) = frame.min(0), frame.max(0)
        inside = legend[top + 3 : bottom - 2, left + 3 : right - 2]
        factor = inside.shape[0] // 8
        assert factor > 1
        np.testing.assert_array_equal(inside, upscale(traced["sources"][source], factor))


def test_the_map_is_the_stronger_the_further_a_draw_was_moved(traced):
    scale = 20
    page = provenance_page(**traced, scale=scale, top=2)
    y, x = find(page, upscale(traced["image"], scale))
    x += 2 * (12 * scale + MARGIN)
    grey = upscale(greyed(traced["image"]), scale).astype(np.float64)
    drawn, step = page[y : y + 8 * scale, x : x + 12 * scale], 2 * scale
    for position, moved in np.ndenumerate(traced["moved"]):
        share = min(abs(moved) / 2.0, 1.0) * STRONGEST  # 2.0 is the largest finite change
        place = np.s_[position[0] * step : (position[0] + 1) * step, position[1] * step : (position[1] + 1) * step]
        expected = (1 - share) * grey[place] + share * np.array(ORANGE if moved > 0 else BLUE)
        np.testing.assert_allclose(drawn[place], expected, atol=1.0)


def test_nothing_retrieved_leaves_no_colour_but_the_pictures(traced):
    traced["source"][:] = -1
    traced["moved"][:] = 0
    page = provenance_page(**traced)
    assert not any((page == color).all(-1).any() for color in PALETTE)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"top": 7}, "top=7"),
        ({"sources": {}}, r"no thumbnail or name of source images \[40"),
        ({"image": np.zeros((9, 12, 3), np.uint8)}, "9 x 12"),
    ],
)
def test_provenance_says_what_is_wrong(traced, change, said):
    with pytest.raises(ValueError, match=said):
        provenance_page(**(traced | change))


def test_source_colours_stay_apart_for_colour_blind_readers():
    """Distances in the two planes left to dichromats (Viénot, Brettel and Mollon 1999, linear RGB)."""
    protan = np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]])
    deutan = np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]])
    linear = (np.array(PALETTE) / 255.0) ** 2.2
    for seen_by in (np.eye(3), protan, deutan):
        seen = np.clip(linear @ seen_by.T, 0, 1) ** (1 / 2.2) * 255
        distances = np.linalg.norm(seen[:, None] - seen[None], axis=-1) + np.eye(len(seen)) * 1e9
        assert distances.min() > 30
