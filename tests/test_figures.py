"""Figures say what they name: draws owed to retrieval, equal patches, common ground, and names on pages."""

import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrag_jax.decode.loop import SampleOutput, sample
from arrag_jax.decode.policies import Daid, Faid, Plain
from arrag_jax.evaluation.origins import COMMON, origins
from arrag_jax.evaluation.provenance import image_record, share_of_draws, summary
from arrag_jax.evaluation.provenance_page import COMMON_GROUND, LEAST_RANGE, NOT_FOUND, STRONGEST, provenance_page
from arrag_jax.figures.canvas import PALETTE, greyed, upscale
from arrag_jax.ops import grid as grid_ops
from arrag_jax.ops.neighbors import Neighbors
from arrag_jax.ops.sampling import mix, neighbor_log_probs
from arrag_jax.training import metrics
from helpers import tiny
from helpers.pixels import find, random_images
from helpers.toy import lines, toy_config


def drawn_with(weight: float) -> tuple[SampleOutput, Daid, np.ndarray]:
    """Sixty pictures, their policy, and which cells have a context; compiled once."""
    model, policy, rows = tiny.janus(), Daid(weight, 0.5, "sum"), np.arange(60) % 2
    ids, mask = tiny.prompts((4, 3))
    found = sample(
        model, ids[rows], policy, tiny.store(model), prompt_mask=mask[rows], cfg_scale=None, seed=np.arange(60)
    )
    return jax.tree.map(np.asarray, found), policy, grid_ops.has_context(*model.grid)


def test_with_weight_zero_no_draw_is_owed_to_retrieval():
    drawn, policy, _ = drawn_with(0.0)
    assert (drawn.rank >= 0).any()  # codes are among the neighbours all the same
    assert (share_of_draws(drawn, policy) == 0).all()


def test_with_weight_one_every_draw_is_that_has_a_context():
    drawn, policy, inside = drawn_with(1.0)
    shares = share_of_draws(drawn, policy)
    np.testing.assert_array_equal(shares, np.broadcast_to(inside, shares.shape))


def test_the_shares_mean_is_the_weight():
    """By the law of total probability, draw by draw; so the mean lies within four standard errors."""
    drawn, policy, inside = drawn_with(0.3)
    shares = share_of_draws(drawn, policy)
    assert (shares[:, ~inside] == 0).all()
    shares = shares[:, inside].ravel()
    assert abs(shares.mean() - 0.3) < 4 * shares.std() / len(shares) ** 0.5
    assert shares.min() < 0.05 < 0.6 < shares.max()


@pytest.mark.slow
def test_a_share_is_how_often_the_coin_of_the_mixture_fell_so():
    """Draws by a coin, from the model's distribution or from the neighbours', counted code by code."""
    rng, weight, number = np.random.default_rng(0), 0.35, 200_000
    log_p = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(1, 6)), jnp.float32))
    near = Neighbors(jnp.array([[2, 0, 2, 5]]), jnp.array([[0.0, 0.1, 0.2, 0.4]]), jnp.arange(4)[None])
    log_q = neighbor_log_probs(near, 6, 0.2, "sum")
    mixed = mix(log_p, log_q, weight, jnp.array([True]))
    by_retrieval = rng.random(number) < weight
    p, q = (np.exp(np.asarray(x[0], np.float64)) for x in (log_p, log_q))
    code = np.where(by_retrieval, rng.choice(6, number, p=q / q.sum()), rng.choice(6, number, p=p / p.sum()))
    rank = np.array([1, -1, 0, -1, -1, 3])
    fields = (np.arange(6), np.asarray(mixed[0]), np.asarray(log_p[0]), rank, rank, np.where(rank < 0, np.inf, 0.1))
    shares = share_of_draws(SampleOutput(*fields), Daid(weight, 0.2, "sum"))
    for c in range(6):
        times = (code == c).sum()
        counted = by_retrieval[code == c].mean()
        assert abs(counted - shares[c]) <= 4 * (shares[c] * (1 - shares[c]) / times) ** 0.5 + 1e-6


@pytest.mark.slow
def test_features_that_are_blended_have_no_share_of_a_draw():
    drawn, policy, _ = drawn_with(0.4)
    assert share_of_draws(drawn, Faid()) is None and share_of_draws(drawn, Plain()) is None
    # Of both at once: what DAiD mixes into FAiD's distribution.
    np.testing.assert_array_equal(share_of_draws(drawn, Faid(policy)), share_of_draws(drawn, policy))
    shares = {"share_among_neighbors": 0.7, "share_common": 0.1, "share_copied": 0.2, "share_largest_copy": 0.1}
    assert summary([{"share_retrieved": None, **shares}]).startswith("no draw is mixed; 70.0% of the codes are among")
    assert summary([{"share_retrieved": 0.0, **shares}]).startswith("0.0% of the draws made by retrieval; 70.0% of the")


def naive_origins(rows, stored, searched):
    """Oracle: every stored patch against every cell's, one by one."""
    height, width = stored.shape[1:]
    context = grid_ops.context_positions(height, width)
    flat, inside = stored.reshape(len(stored), -1), grid_ops.positions_with_context(height, width)
    patch = lambda image, position: (*flat[image, context[position]].tolist(), int(flat[image, position]))  # noqa: E731
    held, credit = {}, np.zeros(len(stored))
    for place in np.flatnonzero(rows >= 0):
        wanted = patch(*(int(x[0]) for x in grid_ops.image_and_position(rows[place : place + 1], height, width)))
        held[place] = [(i, position) for i in searched for position in inside if patch(i, position) == wanted]
    for copies in held.values():
        if len({image for image, _ in copies}) <= max(1, len(searched) // COMMON):
            for image, _ in copies:
                credit[image] += 1 / len(copies)
    return held, credit


@pytest.mark.parametrize("limited", [False, True])
def test_origins_are_the_equal_patches_of_the_store(limited):
    rng = np.random.default_rng(2)
    stored = rng.integers(0, 2, (60, 4, 5)).astype(np.uint16) * 65535  # few different patches
    stored[:, :2] = rng.integers(0, 9, (60, 2, 5))
    searched = np.sort(rng.permutation(60)[:45]) if limited else np.arange(60)
    patches = len(grid_ops.positions_with_context(4, 5))
    rows = searched[rng.integers(0, len(searched), 20)] * patches + rng.integers(0, patches, 20)
    rows[[0, 5, 19]] = -1
    found = origins(rows, stored, searched if limited else None)
    held, credit = naive_origins(rows, stored, searched)
    np.testing.assert_allclose(found.credit, credit, atol=1e-9)
    for position in range(20):
        copies = held.get(position, [])
        images = {image for image, _ in copies}
        assert (found.copies[position], found.images[position]) == (len(copies), len(images))
        assert found.common[position] == (len(images) > max(1, len(searched) // COMMON))
        if copies:
            assert (found.image[position], found.position[position]) in copies
            assert credit[found.image[position]] == pytest.approx(max(credit[image] for image in images))
        else:
            assert found.image[position] == found.position[position] == -1
    assert found.common.any() and not found.common[rows >= 0].all()


def drawn_from(grid: np.ndarray, rows: np.ndarray) -> SampleOutput:
    zeros = np.zeros(grid.size, np.float32)
    return SampleOutput(grid.reshape(-1).astype(np.int32), zeros, zeros, rows, np.where(rows < 0, -1, 0), zeros)


def ground_with_motifs(number: int, height: int = 6, width: int = 8) -> np.ndarray:
    """Images of one plain ground, each but the first with a motif of its own codes in the middle."""
    stored = np.zeros((number, height, width), np.uint16)
    for image in range(1, number):
        stored[image, 2:4, 3:5] = 100 * image + np.arange(4).reshape(2, 2)
    return stored


def first_rows(grid: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """For each cell the first stored patch of the same context and code, as a search gives it; -1 = none."""
    height, width = grid.shape
    positions = grid_ops.positions_with_context(height, width)
    whole = lambda x: np.concatenate(  # noqa: E731
        [grid_ops.contexts_of_grids(x), grid_ops.next_codes_of_grids(x)[..., None]], -1
    ).reshape(-1, 5)
    equal = (whole(grid[None])[:, None] == whole(stored)[None]).all(-1)
    rows = np.full(grid.size, -1)
    rows[positions] = np.where(equal.any(1), equal.argmax(1), -1)
    return rows


def test_plain_ground_is_credited_to_nobody():
    stored = ground_with_motifs(30)
    names = [f"photos/{i:03d}.jpg" for i in range(30)]
    rows = first_rows(stored[7], stored)
    record = image_record(drawn_from(stored[7], rows), stored, names)
    assert (rows[rows >= 0] < 24).any()  # what a search returns first for ground is a patch of image 0
    assert [source["source"] for source in record["sources"]] == ["photos/007.jpg"]
    motif = sum(position["copies"] > 0 and not position["common"] for position in record["cells"])
    assert record["sources"][0]["cells"] == record["sources"][0]["credit"] == motif > 4
    ground = [position for position in record["cells"] if position["common"]]
    assert ground and all(position["images"] >= 29 and position["copies"] > 100 for position in ground)
    assert record["share_common"] == pytest.approx(len(ground) / 48, abs=1e-4)
    whole = image_record(drawn_from(stored[0], first_rows(stored[0], stored)), stored, names)
    assert whole["sources"] == [] and whole["share_common"] == whole["share_among_neighbors"]


def test_equal_images_share_the_credit():
    stored = ground_with_motifs(90)
    stored[[3, 11, 20]] = stored[50]
    record = image_record(drawn_from(stored[50], first_rows(stored[50], stored)), stored, [str(i) for i in range(90)])
    (source,) = record["sources"]
    assert source["credit"] == pytest.approx(source["cells"] / 4, abs=1e-4)
    assert {position["images"] for position in record["cells"] if position["copies"] and not position["common"]} == {4}


@pytest.fixture
def page() -> dict:
    """A page of 2-pixel cells: one of image 4, one common, the others not found."""
    source = np.full((4, 6), NOT_FOUND)
    source[1, 1], source[2, 2] = 4, COMMON_GROUND
    image = np.maximum(random_images(2, 1)[0] // 2, 20)
    sources, names = {4: image[::-1]}, {4: "holiday/beach.jpg"}
    return {"image": image, "source": source, "moved": np.zeros((4, 6)), "sources": sources, "names": names}


def test_common_ground_has_its_own_colours_and_no_frame(page):
    drawn, large = provenance_page(**page, scale=6), upscale(page["image"], 6)
    y, x = find(drawn, large)
    marked = drawn[y : y + 48, x + 72 + 12 : x + 144 + 12]
    np.testing.assert_array_equal(marked[24:36, 24:36], large[24:36, 24:36])
    assert (marked[12, 12:24] == PALETTE[0]).all()
    np.testing.assert_array_equal(marked[36:], upscale(greyed(page["image"]), 6)[36:])


def test_a_page_names_the_file_of_an_image(page):
    one = provenance_page(**page, scale=6)
    two = provenance_page(**page | {"names": {4: "holiday/mount.jpg"}}, scale=6)
    moved = page["source"].copy()
    moved[1, 1] = 5  # another number, the same file
    three = provenance_page(
        **page | {"source": moved, "sources": {5: page["sources"][4]}, "names": {5: page["names"][4]}}
    )
    np.testing.assert_array_equal(three, provenance_page(**page))
    assert one.shape[0] == two.shape[0] and not np.array_equal(one, two)


def test_a_method_that_mixes_nothing_has_no_map_of_moved_draws(page):
    assert provenance_page(**page | {"moved": None}, scale=6).shape[1] < provenance_page(**page, scale=6).shape[1]


def test_small_moves_stay_pale(page):
    page["moved"][3, 3], page["moved"][0, 0] = LEAST_RANGE / 20, -LEAST_RANGE / 50
    drawn, grey = provenance_page(**page, scale=20), upscale(greyed(page["image"]), 20)
    y, x = find(drawn, upscale(page["image"], 20))
    found = drawn[y : y + 160, x + 2 * (240 + 12) : x + 2 * (240 + 12) + 240].astype(float)
    assert 0 < np.abs(found - grey).max() <= STRONGEST / 20 * 255


@pytest.mark.parametrize("side", [48, 384])
def test_a_page_has_a_readable_size(side):
    """Panels of 288 to 384 pixels beside letters of 14."""
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    source = np.full((12, 12), 3)
    drawn = provenance_page(image, source, np.zeros((12, 12)), {3: image}, {3: "a/b.jpg"})
    find(drawn, upscale(image, max(1, 288 // side)))
    assert drawn.shape[0] < 480 and drawn.shape[1] < 1600


def test_a_pace_does_not_count_the_step_that_compiles(tmp_path, monkeypatch):
    now = iter([0.0, 100.0, 101.0, 102.0, 104.0, 106.0, 108.0])
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: next(now), time=time.time))
    config = toy_config(steps=6, log_every=3)
    journal = metrics.Journal(config, 5, tmp_path, 0)
    values = {"loss": jnp.float32(1.0), "grad_norm": jnp.float32(1.0)}
    for step in range(1, 7):
        journal.step_done(step, values, np.arange(2))
    journal.flush()
    journal._writer.close()
    assert [line["steps_per_second"] for line in lines(tmp_path)] == [1.0, 0.5]
