"""Laws of drawing several positions a pass: the same pictures as one position a pass, for every method."""

import dataclasses

import numpy as np
import pytest

from arrag_jax.decode.loop import sample
from arrag_jax.decode.policies import Daid, Faid, Plain
from arrag_jax.decode.stream import joined, sample_stream
from arrag_jax.errors import UserError
from arrag_jax.models.checkpoint import load_model
from arrag_jax.nn.faid import FaidConfig
from arrag_jax.retrieval.dense import DenseRetriever
from arrag_jax.retrieval.scann import ScannRetriever
from arrag_jax.retrieval.stored_codes import StoredCodes
from helpers import tiny

WITH_BLENDERS = dataclasses.replace(tiny.CONFIG, faid=FaidConfig(stride=1, hops=(1, 2), neighbors=3))


@pytest.fixture(scope="module")
def model():
    return tiny.janus(config=WITH_BLENDERS)


@pytest.fixture(scope="module")
def searches(model):
    """The same random keys, searched on the device and on the host."""
    kinds = {"dense": DenseRetriever, "scann": ScannRetriever}
    return {name: tiny.untied(model, kind=kind) for name, kind in kinds.items()} | {"": None}


CASES = {
    "plain": (Plain(), "", {"top_p": 0.8}, 7),
    "daid, dense, without guidance, one whole window": (Daid(0.5, 0.3), "dense", {"cfg_scale": None}, 20),
    "faid+daid, ScaNN": (Faid(Daid(0.4, 0.3, "sum"), neighbors=5), "scann", {"top_k": 5}, 4),
}


def assert_equal(parallel, plain):
    """The same codes from the same sources; log-probabilities up to the rounding of other batch shapes."""
    for name in ("codes", "source", "rank"):
        np.testing.assert_array_equal(getattr(parallel, name), getattr(plain, name))
    for name in ("log_p", "log_p_model", "distance", "weight"):
        np.testing.assert_allclose(getattr(parallel, name), getattr(plain, name), atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_windows_draw_what_single_positions_draw(model, searches, case):
    policy, search, settings, window = CASES[case]
    ids, mask = tiny.prompts((6, 3, 4))
    settings = {"cfg_scale": 2.0, "prompt_mask": mask, "seed": np.array([7, 1, 1]), **settings}
    plain = sample(model, ids, policy, searches[search], **settings)
    parallel = sample(model, ids, policy, searches[search], window=window, **settings)
    assert_equal(parallel, plain)
    cells = model.grid[0] * model.grid[1]
    np.testing.assert_array_equal(plain.drawn_in, np.tile(np.arange(cells), (3, 1)))
    order = np.diff(parallel.drawn_in, axis=1)
    assert ((order == 0) | (order == 1)).all()  # positions are finished in order, and no pass is idle
    assert (np.bincount(np.asarray(parallel.drawn_in)[0]) <= window).all()
    assert (parallel.drawn_in[:, -1] < cells - 1).all()


@pytest.mark.slow
def test_guesses_from_stored_images_change_the_passes_alone(model):
    """Guesses of the very pictures to be drawn are nearly all right; those of other images draw the same."""
    ids, mask = tiny.prompts((6, 3, 4))
    settings = {"cfg_scale": 2.0, "prompt_mask": mask, "seed": 3, "top_p": 0.8}
    plain = sample(model, ids, **settings)
    own = np.asarray(plain.codes).reshape(-1, *model.grid)
    other = np.random.default_rng(0).integers(0, 9, (40, *model.grid))
    passes = []
    for images in (own, other):
        drawn = sample(model, ids, window=7, stored=StoredCodes.of(images, 9), **settings)
        assert_equal(drawn, plain)
        passes.append(int(drawn.drawn_in.max()) + 1)
    assert passes[0] < passes[1] <= 20


@pytest.mark.slow
def test_a_batch_equals_its_pictures_drawn_alone(model, searches):
    """Rows of a batch stand at different positions, and each takes as many passes as it takes alone."""
    ids, mask = tiny.prompts((6, 3))
    settings = {"cfg_scale": 3.0, "window": 5, "return_log_probs": True}
    batch = sample(model, ids, Daid(0.5, 0.2), searches["dense"], prompt_mask=mask, seed=np.array([7, 2]), **settings)
    for i in range(2):
        alone_ids = ids[i : i + 1, int((~mask[i]).sum()) :]
        alone = sample(
            model, alone_ids, Daid(0.5, 0.2), searches["dense"], seed=np.array([7, 2])[i : i + 1], **settings
        )
        np.testing.assert_array_equal(batch.codes[i], alone.codes[0])
        np.testing.assert_allclose(batch.log_probs[i], alone.log_probs[0], atol=2e-5)
        np.testing.assert_array_equal(batch.drawn_in[i], alone.drawn_in[0])


@pytest.mark.slow
def test_the_reference_draws_the_same(reference):
    golden = np.load(reference("base.npz"))
    drawn = sample(
        load_model(reference("janus_layout"), grid=(6, 6)), golden["text_ids_left"], window=9,
        prompt_mask=golden["text_mask_left"], cfg_scale=5.0, greedy=True,
    )  # fmt: skip
    for i in (0, 1):
        np.testing.assert_array_equal(drawn.codes[i], golden[f"dec_tokens_{i}"])


@pytest.mark.slow
def test_rows_are_streamed_when_the_last_picture_has_them(model):
    ids, mask = tiny.prompts((6, 3, 4))
    settings = {"cfg_scale": 2.0, "prompt_mask": mask, "seed": 3, "top_p": 0.8}
    rows = list(sample_stream(model, ids, window=7, **settings))
    assert all((row.codes >= 0).all() for row in rows)
    assert_equal(joined(rows), sample(model, ids, **settings))


@pytest.mark.parametrize(("window", "message"), [(0, "window = 0 must be at least 1"), (21, "the 20 positions")])
def test_windows_that_cannot_be_are_named(model, window, message):
    with pytest.raises(UserError, match=message):
        sample(model, np.zeros((1, 4), np.int32), window=window)
