"""Laws of drawing parts of pictures: known codes stay, draws follow from their own noise, keys may look ahead."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from arrag_jax.config import NeighborsConfig, RetrievalConfig
from arrag_jax.decode.loop import sample
from arrag_jax.decode.policies import Daid, Faid, Plain
from arrag_jax.decode.stream import joined, sample_stream
from arrag_jax.errors import UserError
from arrag_jax.nn.faid import FaidConfig
from arrag_jax.ops import grid as grid_ops
from arrag_jax.ops.distances import host_distances
from arrag_jax.ops.keys import around
from arrag_jax.retrieval.around import DenseAround
from arrag_jax.retrieval.dense import DenseRetriever
from arrag_jax.retrieval.patches import Patches
from helpers import tiny

WITH_BLENDERS = dataclasses.replace(tiny.CONFIG, faid=FaidConfig(stride=1, hops=(1, 2), neighbors=3))
SETTINGS = {"cfg_scale": 2.0, "top_p": 0.8, "seed": np.array([7, 1, 1])}


@pytest.fixture(scope="module")
def model():
    return tiny.janus(config=WITH_BLENDERS)


@pytest.fixture(scope="module")
def grids():
    return np.random.default_rng(0).integers(0, 9, (30, 4, 5))


@pytest.fixture(scope="module")
def searches(model, grids):
    codebook = np.asarray(model.codebook)
    contexts, codes = grid_ops.contexts_of_grids(grids).reshape(-1, 4), grid_ops.next_codes_of_grids(grids).reshape(-1)
    return {
        "": None,
        "before": DenseRetriever.of(Patches.deduplicate(contexts, codes, codebook), codebook, 6),
        "around": DenseAround.of(grids, codebook, 6),
    }


@pytest.fixture(scope="module")
def known():
    """About half of the codes of three pictures; the second has none, the third all but the first."""
    rng = np.random.default_rng(1)
    codes = np.where(rng.random((3, 20)) < 0.5, rng.integers(0, 9, (3, 20)), -1)
    codes[1], codes[2], codes[2, 0] = -1, rng.integers(0, 9, 20), -1
    return codes


def prompts():
    ids, mask = tiny.prompts((6, 3, 4))
    return {"condition": ids, "prompt_mask": mask, **SETTINGS}


def assert_equal(found, wanted):
    """Equal in all that the windows of a draw must not change."""
    for name in ("codes", "source", "rank"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    for name in ("log_p", "log_p_model", "distance", "weight"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), atol=2e-5)


CASES = {
    "plain": (Plain(), ""),
    "daid": (Daid(0.5, 0.3), "before"),
    "daid, two-sided": (Daid(0.5, 0.3), "around"),
    "faid+daid, two-sided": (Faid(Daid(0.4, 0.3, "sum")), "around"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_known_codes_stay_and_windows_draw_the_same(model, searches, known, case):
    policy, search = CASES[case]
    drawn = sample(model, policy=policy, retriever=searches[search], known=known, **prompts())
    given = known >= 0
    np.testing.assert_array_equal(np.asarray(drawn.codes)[given], known[given])
    for name, value in (("log_p", 0), ("log_p_model", 0), ("source", -1), ("rank", -1), ("weight", 0)):
        assert (np.asarray(getattr(drawn, name))[given] == value).all()
    assert_equal(sample(model, policy=policy, retriever=searches[search], known=known, window=7, **prompts()), drawn)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_without_a_known_code_the_picture_is_the_plain_one(model, searches, case):
    """To the bit, with two-sided keys, too: then they are those of the context."""
    policy, search = CASES[case]
    plain = sample(model, policy=policy, retriever=searches["before" if search else ""], **prompts())
    nothing = sample(model, policy=policy, retriever=searches[search], known=np.full((3, 20), -1), **prompts())
    for name, wanted in plain._asdict().items():
        if wanted is not None:
            np.testing.assert_array_equal(getattr(nothing, name), wanted, err_msg=name)


def test_a_drawing_given_its_own_codes_is_drawn_again(model, searches):
    """A draw follows from its noise and its context: whichever codes are given, the others are drawn as before."""
    whole = sample(model, policy=Daid(0.5, 0.3), retriever=searches["before"], **prompts())
    codes = np.asarray(whole.codes)
    for seed in (0, 1):
        given = np.where(np.random.default_rng(seed).random(codes.shape) < 0.6, codes, -1)
        again = sample(model, policy=Daid(0.5, 0.3), retriever=searches["before"], known=given, **prompts())
        np.testing.assert_array_equal(again.codes, codes)
        np.testing.assert_array_equal(again.log_p, np.where(given >= 0, 0, whole.log_p))


@pytest.mark.slow
def test_a_batch_equals_its_pictures_drawn_alone_and_its_rows(model, searches, known):
    ids, mask = tiny.prompts((6, 3, 4))
    settings = {"policy": Daid(0.5, 0.3), "retriever": searches["around"], "cfg_scale": 2.0, "window": 5}
    batch = sample(model, ids, prompt_mask=mask, seed=SETTINGS["seed"], known=known, **settings)
    for i in range(3):
        own = slice(i, i + 1)
        alone = sample(model, ids[own], prompt_mask=mask[own], seed=SETTINGS["seed"][own], known=known[own], **settings)
        np.testing.assert_array_equal(batch.codes[own], alone.codes)
        np.testing.assert_array_equal(batch.source[own], alone.source)
    rows = list(sample_stream(model, ids, prompt_mask=mask, seed=SETTINGS["seed"], known=known, **settings))
    np.testing.assert_array_equal(joined(rows).codes, batch.codes)


@pytest.mark.parametrize(
    ("known", "message"),
    [
        (np.zeros((1, 19), int), r"whole numbers \[1, 20\], got int64 \[1, 19\]"),
        (np.zeros((1, 20)), "got float64"),
        (np.full((1, 20), 9), "codes below 9"),
        (np.full((1, 20), -2), "codes below 9"),
    ],
)
def test_known_codes_that_cannot_be_are_named(model, known, message):
    with pytest.raises(UserError, match=message):
        sample(model, np.zeros((1, 4), np.int32), known=known)


@pytest.mark.slow
@pytest.mark.parametrize("deduplicate", [True, False])
def test_two_sided_search_equals_brute_force(model, grids, deduplicate):
    """The oracle computes every distance over the known neighbours alone, and orders by distance, then by row."""
    shown, codebook, rng = np.arange(30) % 7 != 3, np.asarray(model.codebook), np.random.default_rng(2)
    queries = np.where(rng.random((200, 8)) < 0.4, -1, rng.integers(0, 9, (200, 8))).astype(np.int32)
    queries[:40] = np.where(rng.random((40, 8)) < 0.3, -1, around.stored(grids)[:40])
    search = DenseAround.of(grids, codebook, 11, shown, deduplicate)
    found, stored = search.search_around(jnp.asarray(queries)), around.stored(grids)
    values, rows = grid_ops.next_codes_of_grids(grids).reshape(-1), np.flatnonzero(np.repeat(shown, 9))
    met = 0
    for query, *answer in zip(queries, *map(np.asarray, found), strict=True):
        if (query[:4] < 0).any() and (query[4:] < 0).all():
            assert (answer[2] == -1).all() and np.isinf(answer[1]).all()
            continue
        asked = np.flatnonzero(query >= 0)
        key = codebook[stored[rows][:, asked]]
        absent = stored[rows][:, asked] < 0
        vectors = np.broadcast_to(codebook[query[asked]], key.shape)
        # a stored patch without this neighbour is as far as an opposite vector of unit length
        unit = np.eye(codebook.shape[1], dtype=np.float32)[0]
        vectors, key = (np.where(absent[..., None], x, y) for x, y in ((unit, vectors), (-unit, key)))
        distance = host_distances(vectors.reshape(len(rows), -1), key.reshape(len(rows), 1, -1))[:, 0]
        order = np.lexsort((rows, distance))[:11]
        np.testing.assert_array_equal(answer[2], rows[order])
        np.testing.assert_array_equal(answer[1], distance[order])
        np.testing.assert_array_equal(answer[0], values[rows[order]])
        met += 1
    assert met > 100


def test_two_sided_keys_are_refused_where_they_cannot_be():
    with pytest.raises(UserError, match="not keys=latent"):
        RetrievalConfig("store", keys="latent", two_sided=True)
    with pytest.raises(UserError, match="search=scann"):
        RetrievalConfig("store", search="scann", two_sided=True)
    with pytest.raises(UserError, match="two_sided is for pictures"):
        NeighborsConfig("model", RetrievalConfig("store", two_sided=True), "train", "valid")
