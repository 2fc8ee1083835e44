"""Laws of a start from a model folder that knows fewer words and fewer codes than the run."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from arrag_jax.errors import UserError
from arrag_jax.models.checkpoint import save_model
from arrag_jax.models.text import PromptTokenizer
from arrag_jax.training.start import params_of
from helpers import tiny

FEW, MANY = PromptTokenizer.of_words(["cat", "pig"]), PromptTokenizer.of_words(["bee", "cat", "dog", "pig"])


def model(words: PromptTokenizer, codes: int, seed: int):
    config = dataclasses.replace(
        tiny.CONFIG,
        language=dataclasses.replace(tiny.CONFIG.language, vocab_size=words.vocab_size),
        vision=dataclasses.replace(tiny.CONFIG.vision, codebook_size=codes),
    )
    return tiny.janus(seed, config)


def params_of_model(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def by_path(params) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """A saved model of few words and 9 codes, and its parameters by path."""
    folder = tmp_path_factory.mktemp("known")
    few = model(FEW, 9, 0)
    save_model(few, folder)
    FEW.save(folder)
    return folder, by_path(params_of_model(few))


def start(folder, fresh, vocabulary) -> dict[str, np.ndarray]:
    return by_path(params_of(str(folder), params_of_model(fresh), ("error", "min"), vocabulary)[0])


@pytest.mark.slow
def test_words_go_by_their_text_codes_by_their_number_and_new_rows_stay_fresh(known):
    folder, old = known
    fresh = model(MANY, 12, 1)
    new, random = start(folder, fresh, MANY.vocabulary), by_path(params_of_model(fresh))
    words = "language_model.embed_tokens.embedding"
    for word, row in MANY.vocabulary.items():
        expected = old[words][FEW.vocabulary[word]] if word in FEW.vocabulary else random[words][row]
        np.testing.assert_array_equal(new[words][row], expected)
    grown = {path for path in old if path != words and old[path].shape != new[path].shape}
    assert grown == {
        "gen_embed.embedding", "gen_head.layers.1.weight", "gen_head.layers.1.bias", "gen_vision_model.codes"
    }  # fmt: skip
    for path in grown:
        np.testing.assert_array_equal(new[path], np.concatenate([old[path], random[path][9:]]))
    for path in old.keys() - grown - {words}:
        np.testing.assert_array_equal(new[path], old[path])


def test_words_of_another_order_go_by_their_text(known):
    """As many words as the folder has, so the shapes agree."""
    folder, old = known
    turned = {word: FEW.vocab_size - 1 - row for word, row in FEW.vocabulary.items()}
    words = "language_model.embed_tokens.embedding"
    np.testing.assert_array_equal(start(folder, model(FEW, 9, 1), turned)[words][::-1], old[words])


@pytest.mark.slow
def test_a_run_that_lacks_words_or_codes_of_the_folder_is_refused(known):
    folder, _ = known
    others = PromptTokenizer.of_words(["bee", "cat", "dog"])
    with pytest.raises(UserError, match=r"holds parameters of another model: it knows pig; choose another run"):
        start(folder, model(others, 9, 1), others.vocabulary)
    with pytest.raises(UserError, match=r"has shape \(9, 8\), not \(5, 8\); choose another run"):
        start(folder, model(FEW, 5, 1), FEW.vocabulary)
