"""The seams between models and everything else: a slim backbone of another family draws, loads and saves like ours."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import arrag_jax
from arrag_jax.decode.loop import sample
from arrag_jax.decode.policies import Daid, Faid
from arrag_jax.errors import UserError
from arrag_jax.interfaces import Backbone, BlendingBackbone, ImageModel, ImageTokenizer, PromptEncoder, TunableModel
from arrag_jax.models import registry
from arrag_jax.models.checkpoint import load_model, load_prompts, load_tokenizer, save_model
from arrag_jax.models.janus import VISION
from arrag_jax.models.llamagen_prompts import ClassNumbers
from arrag_jax.models.text import PromptTokenizer
from helpers import tiny

LABELS, SIZE, WIDTH = 5, 9, 6


class Labelled(nnx.Module):
    """Draws codes under class labels int [B]; it has what ``Backbone`` asks for and no more."""

    grid, codebook_size = (4, 5), SIZE

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        shapes = {"labels": (LABELS + 1, WIDTH), "codes": (SIZE, WIDTH), "places": (20, WIDTH), "head": (WIDTH, SIZE)}
        for name, shape in shapes.items():
            setattr(self, name, nnx.Param(jnp.asarray(rng.normal(size=shape), jnp.float32)))

    def with_grid(self, grid):
        return self

    def check_condition(self, condition, mask=None):
        labels = np.asarray(condition)
        if labels.ndim != 1 or mask is not None:
            raise UserError(f"labels must be [B] without a mask, got {labels.shape}")
        return jnp.asarray(labels, jnp.int32)

    def unconditional(self, condition):
        return jnp.full_like(condition, LABELS)

    def embed_codes(self, codes):
        return self.codes[...][codes]

    def prefill(self, condition, blended_rows):
        start = self.labels[...][condition]
        return start, start

    def step(self, hidden, cache, position, features=None):
        return self._logits(hidden, cache, self.places[...][position][None]), cache

    def teacher_forced(self, condition, codes, neighbors=None):
        start = self.labels[...][condition][:, None]
        before = jnp.concatenate([start, self.embed_codes(codes[:, :-1])], axis=1)
        return self._logits(before, start, self.places[...][None])

    def _logits(self, before, start, place):
        return 2 * jnp.tanh(before + start + place) @ self.head[...]


@pytest.mark.slow
@pytest.mark.parametrize("policy", [None, Daid(0.4, 0.2)])
def test_a_slim_backbone_draws_what_teacher_forcing_says(policy):
    """Under a condition that is one array, guided, with retrieval and without."""
    model, labels = Labelled(0), np.array([0, 3, 4])
    drawn = sample(model, labels, policy, tiny.store(tiny.janus()), cfg_scale=2.0, seed=np.array([1, 2, 3]))
    cond, uncond = (model.teacher_forced(x, drawn.codes) for x in (jnp.asarray(labels), jnp.full(3, LABELS)))
    log_p = jax.nn.log_softmax(uncond + 2.0 * (cond - uncond))
    expected = jnp.take_along_axis(log_p, drawn.codes[..., None], -1)[..., 0]
    np.testing.assert_allclose(drawn.log_p_model, expected, atol=1e-5)
    assert (policy is None) == bool((np.asarray(drawn.source) < 0).all())


def test_a_slim_backbone_is_none_that_blends():
    model = Labelled(0)
    assert isinstance(model, Backbone) and not isinstance(model, BlendingBackbone | ImageTokenizer)
    with pytest.raises(UserError, match="no FAiD blenders"):
        sample(model, np.array([1]), Faid(), tiny.store(tiny.janus()))


def test_a_janus_has_every_seam():
    model = tiny.janus()
    assert isinstance(model, ImageModel) and isinstance(model, TunableModel)
    assert isinstance(tiny.janus(parts=VISION), ImageTokenizer)
    assert isinstance(PromptTokenizer.of_words(["a cat"]), PromptEncoder)
    assert model.image_size == model.config.image_size == tiny.janus(parts=VISION).image_size


@pytest.mark.slow
def test_a_condition_is_a_pair_or_ids_beside_a_mask():
    model, (ids, mask) = tiny.janus(), tiny.prompts((4, 2))
    beside, pair = sample(model, ids, prompt_mask=mask), sample(model, (ids, mask))
    np.testing.assert_array_equal(beside.codes, pair.codes)
    scores = model.score(ids, beside.codes, prompt_mask=mask), model.score((ids, mask), beside.codes)
    np.testing.assert_array_equal(*scores)
    rows = tuple(map(tuple, ids[:, -2:].tolist()))  # two prompts as tuples are no pair of ids and mask
    np.testing.assert_array_equal(model.check_condition(rows)[0], ids[:, -2:])


@pytest.mark.slow
def test_a_tokenizer_may_be_traced():
    """Codes are those of a call outside, whatever else the program does."""
    model = tiny.janus()
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, *model.image_size, 3)), jnp.float32)
    graph, state = nnx.split(model)

    @jax.jit
    def there_and_back(state, images):
        model = nnx.merge(graph, state)
        codes, latents = model.encode_images(images)
        return codes, model.decode_codes(codes, *latents.shape[1:3])

    codes, pixels = there_and_back(state, images)
    np.testing.assert_array_equal(codes, model.encode_images(images)[0])
    np.testing.assert_allclose(pixels, model.decode_codes(codes, *model.grid), atol=1e-6)


def test_a_family_is_one_line_of_the_registry(tmp_path, monkeypatch):
    """Folders go to it by ``model_type``, models by their class."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "labelled", "seed": 3}))
    for load in (load_model, load_tokenizer, load_prompts):
        with pytest.raises(UserError, match=r"another model \(model_type 'labelled'\); known are .*multi_modality"):
            load(tmp_path)
    saved = []
    family = dataclasses.replace(
        registry.JANUS,
        model_types=("labelled",),
        kind=Labelled,
        recognises=lambda config: False,
        load=lambda directory, dtype, grid, mesh, int8: tiny.janus(registry.read_json(directory)["seed"]),
        save=lambda model, directory, dtype: saved.append((directory, dtype)),
        prompts=lambda directory: ClassNumbers(5),
    )
    monkeypatch.setattr(registry, "FAMILIES", (registry.JANUS, family))
    assert load_model(tmp_path).fingerprint == tiny.janus(3).fingerprint
    np.testing.assert_array_equal(load_prompts(tmp_path)(["2", "4"]), [2, 4])
    save_model(Labelled(0), tmp_path, "bfloat16")
    assert saved == [(tmp_path, "bfloat16")]
    save_model(tiny.janus(), tmp_path / "janus")
    assert load_model(tmp_path / "janus").fingerprint == tiny.janus().fingerprint


def test_the_public_names_come_from_the_package():
    drawing = {"sample", "sample_stream", "Daid", "Faid"}
    assert drawing | {"PromptTokenizer", "load_model", "load_retriever"} == set(arrag_jax.__all__)
    assert arrag_jax.Daid is Daid and arrag_jax.load_model is load_model
    with pytest.raises(AttributeError, match="no attribute 'Studio'"):
        _ = arrag_jax.Studio
