"""Caption-aware retrieval: images are chosen by an oracle's nearness, and the search is the dense one over them."""

import collections
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrag_jax.decode.loop import sample
from arrag_jax.decode.policies import Daid
from arrag_jax.errors import UserError
from arrag_jax.interfaces import Retriever
from arrag_jax.ops import grid as grid_ops
from arrag_jax.retrieval import captions as captions_module
from arrag_jax.retrieval.captions import LimitedRetriever, TermIndex
from arrag_jax.retrieval.dense import DenseRetriever
from arrag_jax.store.datastore import Datastore
from helpers import tiny
from helpers.stored import CODES, GRID, build, keys_of, values_of

CAPTIONS = [
    "a cat",
    "a red car and a blue fish",
    "a blue car and a red fish",
    "two dogs",
    "a cat",
    "A Red Car, Two dogs",
]
CHOSEN = np.array([[4, 1, 7], [0, 1, 9]], np.int32)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Datastore:
    return build(tmp_path_factory.mktemp("store") / "store", CAPTIONS * 2, kept=True)


def test_a_store_keeps_captions_one_a_line(store, tmp_path):
    assert store.captions == CAPTIONS * 2
    store.verify()
    broken = build(tmp_path / "lines", ["a\ncat", " two\t dogs\r\n"], kept=True)
    assert broken.captions == ["a cat", "two dogs"]


def test_a_store_without_captions_says_so(tmp_path):
    with pytest.raises(UserError, match="holds no captions; build one with --config"):
        _ = build(tmp_path / "none").captions
    with pytest.raises(UserError, match="these images have no captions"):
        build(tmp_path / "asked", kept=True)


def naive_nearness(prompt: str, captions: list[str]) -> np.ndarray:
    """Oracle: cosines of idf vectors, text by text."""

    def terms(text):
        words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
        return set(words) | {f"{a} {b}" for a, b in itertools.pairwise(words)}

    documents = [terms(caption) for caption in captions]
    count = collections.Counter(term for document in documents for term in document)
    idf = {term: math.log(1 + len(captions) / n) for term, n in count.items()}
    norm = lambda words: math.sqrt(sum(idf[w] ** 2 for w in words))  # noqa: E731
    asked = terms(prompt) & idf.keys()
    return np.array([sum(idf[w] ** 2 for w in asked & d) / norm(asked) / norm(d) for d in documents])


@pytest.mark.parametrize("prompt", ["a red car", "two cats", "a BLUE fish and a zebra", "dogs"])
def test_captions_are_ranked_by_the_cosine_of_their_terms(prompt):
    expected = naive_nearness(prompt, CAPTIONS)
    index = TermIndex(CAPTIONS)
    found = index.cosine(prompt)
    np.testing.assert_allclose(found / np.linalg.norm(found), expected / np.linalg.norm(expected), atol=1e-9)
    np.testing.assert_array_equal(index.nearest([prompt], 6)[0], np.argsort(-found, kind="stable"))


def test_the_prompts_own_caption_is_nearest_and_equal_ones_stand_by_number():
    index = TermIndex(CAPTIONS)
    assert index.nearest(["a cat", "a blue car and a red fish"], 2).tolist() == [[0, 4], [2, 1]]


def test_what_cannot_be_chosen_is_said():
    index = TermIndex(CAPTIONS)
    with pytest.raises(UserError, match="7 images are to be chosen by their captions, 6 are stored"):
        index.nearest(["a cat"], 7)
    with pytest.raises(UserError, match="no stored caption has a word of the prompt 'zebras'"):
        index.nearest(["a cat", "zebras"], 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["codebook", "latent"])
@pytest.mark.parametrize("score_bytes", [None, 1])
def test_the_limited_search_is_the_dense_search_over_the_chosen_images(store, monkeypatch, kind, score_bytes):
    if score_bytes:
        monkeypatch.setattr(captions_module, "SCORE_BYTES", score_bytes)  # prompt by prompt
    patches, each, k = store.settings.patches_per_image, 5, 7
    limited = LimitedRetriever.create(store, CHOSEN, kind, k)
    assert isinstance(limited, Retriever)
    context = np.random.default_rng(1).integers(0, CODES, (2 * each, 4)).astype(np.int32)
    context[3] = -1
    found = jax.jit(lambda retriever, context: retriever.search(context))(limited, jnp.asarray(context))
    keys, values = keys_of(store, kind), values_of(store)
    for b, images in enumerate(CHOSEN):
        rows = (images[:, None] * patches + np.arange(patches)).reshape(-1)
        own = slice(b * each, (b + 1) * each)
        alone = DenseRetriever.create(keys[rows], values[rows], store.codebook, k).search(jnp.asarray(context[own]))
        np.testing.assert_allclose(found.distance[own], alone.distance, atol=1e-6)
        # Different patches at one distance may change places: the last bit of a product depends on its batch.
        has_context = (context[own] >= 0).all(1)
        assert (np.asarray(found.id[own])[~has_context] == -1).all()
        code, distance, id_ = (np.asarray(x[own])[has_context] for x in found)
        query = store.codebook[context[own][has_context]].reshape(-1, 1, keys.shape[1])
        np.testing.assert_allclose(((query - keys[id_]) ** 2).sum(-1), distance, atol=1e-5)
        np.testing.assert_array_equal(code, values[id_])
        assert np.isin(id_, rows).all() and all(len(set(row)) == k for row in id_)


@pytest.mark.slow
def test_all_images_chosen_is_the_whole_search(store):
    everything = np.tile(np.arange(12, dtype=np.int32), (3, 1))
    context = jnp.asarray(np.random.default_rng(2).integers(0, CODES, (3, 4)), jnp.int32)
    whole = DenseRetriever.create(keys_of(store, "latent"), values_of(store), store.codebook, 9).search(context)
    for ours, theirs in zip(
        LimitedRetriever.create(store, everything, "latent", 9).search(context), whole, strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.slow
def test_limited_to_one_image_at_weight_one_only_its_codes_are_drawn(store):
    """Each picture of the batch has an image of its own."""
    model = tiny.janus()
    ids, mask = tiny.prompts((4, 3, 2))
    images = np.array([[3], [8], [3]], np.int32)
    search = LimitedRetriever.create(store, images, "codebook", 6)
    drawn = sample(model, ids, Daid(1.0, 0.5), search, prompt_mask=mask)
    np.testing.assert_array_equal(
        sample(model, ids, Daid(1.0, 0.5), search, prompt_mask=mask, window=6).codes, drawn.codes
    )
    inside = grid_ops.has_context(*GRID)
    image, position = grid_ops.image_and_position(np.asarray(drawn.source), *GRID)
    assert (image[:, inside] == images).all()
    stored = store.codes.reshape(len(store.codes), -1)
    np.testing.assert_array_equal(stored[image[:, inside], position[:, inside]], np.asarray(drawn.codes)[:, inside])


def test_more_neighbours_than_chosen_patches_is_a_user_error(store):
    with pytest.raises(UserError, match="k=37"):
        LimitedRetriever.create(store, CHOSEN, "codebook", 37)


def test_a_store_from_before_captions_opens(tmp_path):
    build(tmp_path / "store")
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    del manifest["settings"]["captions"]
    (tmp_path / "store" / "manifest.json").write_text(json.dumps(manifest))
    assert not Datastore.open(tmp_path / "store").settings.captions
