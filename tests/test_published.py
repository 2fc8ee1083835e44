"""The API on folders as they are published, whose configs name no grid, no K and no pad."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import arrag_jax
from arrag_jax import generate
from arrag_jax.config import DrawConfig, MeshConfig, RetrievalConfig, SamplingConfig
from arrag_jax.decode.loop import image_keys
from arrag_jax.decode.policies import Daid
from arrag_jax.errors import UserError
from arrag_jax.evaluation import pipeline as drawing
from arrag_jax.models.checkpoint import save_model
from arrag_jax.models.text import BOS, PromptTokenizer, chat_form
from arrag_jax.nn.vq import to_uint8
from helpers import tiny
from helpers.published import write_checkpoint


class TestPrecision:
    """bfloat16."""

    def test_a_bfloat16_load_scores_nearly_the_same(self, tmp_path):
        """About fifty roundings by 2⁻⁹ lie on a number's way through two layers and the head (twelve operations a
        layer, each with rounded weights or inputs and a rounded result), and they add up like noise."""
        model, (ids, mask) = tiny.janus(), tiny.prompts((4, 3))
        save_model(model, tmp_path)
        codes = np.random.default_rng(0).integers(0, 9, (2, 20))
        exact, rounded = (
            np.asarray(each.score(ids, codes, prompt_mask=mask))
            for each in (model, arrag_jax.load_model(tmp_path, dtype="bfloat16"))
        )
        assert rounded.dtype == np.float32
        assert 0 < (rounded - exact).std() < 50**0.5 * 2**-9 * exact.std()


class TestGrids:
    """Three ways to say a grid."""

    def test_they_draw_the_same(self, tmp_path):
        """Here no cell has a context, so that retrieval does nothing, even with a weight of one."""
        model, (ids, mask) = tiny.janus(), tiny.prompts((4, 3))
        save_model(model, tmp_path)
        one = arrag_jax.sample(model, ids, prompt_mask=mask, grid=(3, 2))
        for other in (model.with_grid([3, 2]), arrag_jax.load_model(tmp_path, grid=np.array([3, 2]))):
            np.testing.assert_array_equal(arrag_jax.sample(other, ids, prompt_mask=mask).codes, one.codes)
        daid = arrag_jax.sample(model, ids, Daid(1.0, 0.5), tiny.store(model), prompt_mask=mask, grid=(3, 2))
        np.testing.assert_array_equal(daid.codes, one.codes)
        np.testing.assert_array_equal(daid.log_p, one.log_p)
        assert model.grid == (4, 5) and one.codes.shape == (2, 6) and np.all(daid.source == -1)

    def test_a_model_over_another_grid_shares_its_parts(self):
        model = tiny.janus()
        other = model.with_grid((3, 2))
        assert other.grid == (3, 2) and other.language_model is model.language_model


class TestAnyArrays:
    """Numbers of numpy, JAX and Python are the same numbers."""

    def test_drawing(self):
        model, (ids, mask) = tiny.janus(), tiny.prompts((4, 3))
        expected = arrag_jax.sample(model, ids, prompt_mask=mask, cfg_scale=5.0, seed=np.array([3, 4]))
        for change in (
            {"condition": ids.tolist(), "prompt_mask": mask.astype(int).tolist(), "seed": [3, 4]},
            {"condition": jnp.asarray(ids), "prompt_mask": mask.astype(np.float32), "seed": jnp.array([3, 4])},
            {"cfg_scale": 5, "temperature": 1, "seed": (np.int64(3), np.int64(4))},
            {"cfg_scale": np.float32(5), "temperature": np.array(1.0), "greedy": np.False_},
            {"cfg_scale": np.array(5.0), "temperature": jnp.array(1.0)},
        ):
            given = {"condition": ids, "prompt_mask": mask, "seed": np.array([3, 4]), **change}
            np.testing.assert_array_equal(arrag_jax.sample(model, **given).codes, expected.codes)
        one, other = (jax.random.key_data(image_keys(seed, 2)) for seed in (3, np.int64(3)))
        np.testing.assert_array_equal(one, other)

    def test_scoring(self):
        model, (ids, mask) = tiny.janus(), tiny.prompts((4, 3))
        codes = np.random.default_rng(0).integers(0, 9, (2, 20))
        expected = model.score(ids, codes, prompt_mask=mask)
        for kind in (jnp.asarray, np.ndarray.tolist):
            given = model.score(kind(ids), kind(codes), prompt_mask=kind(mask))
            np.testing.assert_array_equal(given, expected)

    def test_images(self):
        model = tiny.janus()
        images = np.random.default_rng(0).uniform(-1, 1, (2, 4, 6, 3)).astype(np.float32)
        codes, _ = model.encode_images(images)
        for given in (images.tolist(), images.astype(float), jnp.asarray(images)):
            np.testing.assert_array_equal(model.encode_images(given)[0], codes)
        pixels = model.decode_codes(codes.tolist(), np.int64(2), np.array(3))
        np.testing.assert_array_equal(pixels, model.decode_codes(codes, 2, 3))
        with pytest.raises(UserError, match=r"images must be floats in \[-1, 1\], got uint8; scale 0 … 255 by"):
            model.encode_images(np.zeros((1, 4, 4, 3), np.uint8))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tiny model under a config without keys of our own, its image size 8 x 8 pixels, with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("published")
    write_checkpoint(folder)
    return folder


def test_a_byte_level_tokenizer_reads_the_chat_form(published):
    text, model = PromptTokenizer.load(published), arrag_jax.load_model(published)
    ids, mask = text(["a red car", "two naïve 猫"])
    for row, prompt in enumerate(("a red car", "two naïve 猫")):
        real = ids[row][mask[row]]
        assert text.tokenizer.id_to_token(int(real[0])) == BOS and BOS not in text.tokenizer.decode(real[1:])
        assert text.tokenizer.decode(real[1:], skip_special_tokens=False) == chat_form(prompt)
    assert model.grid == (4, 4)
    assert model.config.pad_id == text.pad_id == text.tokenizer.token_to_id("<｜▁pad▁｜>")


def test_generate_draws_what_the_api_draws(published, tmp_path):
    config = DrawConfig(
        str(published), RetrievalConfig(store=""), sampling=SamplingConfig(cfg_scale=5.0), mesh=MeshConfig(1, 1), seed=7
    )
    generate.run(config, str(tmp_path), ["a red car"], test_prompts=0, method="plain", scale=1)
    model = arrag_jax.load_model(published)
    ids, mask = PromptTokenizer.load(published)(["a red car"])
    drawn = arrag_jax.sample(model, ids, cfg_scale=5.0, seed=[7], prompt_mask=mask)
    expected = to_uint8(model.decode_codes(drawn.codes, 4, 4))[0]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "00_plain.png")), expected)


@pytest.mark.slow
def test_the_bar_moves_row_by_row(published, monkeypatch):
    told = []

    class Bar(contextlib.nullcontext):
        def update(self, cells: int) -> None:
            told.append(cells)

    monkeypatch.setattr(drawing.progress, "bar", lambda **options: Bar(Bar()))
    pipeline = drawing.open_pipeline(
        DrawConfig(str(published), RetrievalConfig(store=""), mesh=MeshConfig(1, 1)), ["plain"]
    )
    list(pipeline.draw(["a red car"], "plain", np.array([3])))
    assert told == [4, 4, 4, 4]
