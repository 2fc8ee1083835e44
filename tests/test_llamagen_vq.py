"""LlamaGen's tokenizers: the golden VQ-8 and VQ-16, raw codebooks, and what lies on disk in float16."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from arrag_jax.errors import UserError
from arrag_jax.models.checkpoint import load_model, load_tokenizer
from arrag_jax.nn.vq import l2_normalize
from helpers import llamagens

FILES = {"vq8": "vq8.safetensors", "vq16": "vq16.pt", "vq8_g32": "vq8_g32.safetensors"}


def folder(path: Path, name: str) -> Path:
    """A folder that holds a golden tokenizer alone."""
    section = llamagens.golden()["vq"][name]
    shutil.copyfile(llamagens.path(FILES[name]), path / f"vq{Path(FILES[name]).suffix}")
    (path / "config.json").write_text(json.dumps({"model_type": "llamagen", "family": "c2i", "vq": section}))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_codes_latents_and_pixels_are_the_references(tmp_path, name):
    model = load_tokenizer(folder(tmp_path, name))
    golden, unit = llamagens.arrays(name), model.config.vision.unit_codes
    nhwc = lambda x: np.moveaxis(x, 1, -1)  # noqa: E731
    codes, latents = model.encode_images(nhwc(golden["image"]))
    np.testing.assert_array_equal(codes, golden["enc_codes"])
    np.testing.assert_allclose(latents, l2_normalize(jnp.asarray(nhwc(golden["latent"]))), atol=1e-5)
    used = np.asarray(model.codebook if unit else model.vq.codes[...])
    np.testing.assert_allclose(used[codes].reshape(latents.shape), nhwc(golden["quant"]), atol=1e-5)
    side = int(np.sqrt(codes.shape[1]))
    again = np.clip(nhwc(golden["recon"]), -1, 1)
    np.testing.assert_allclose(model.decode_codes(codes, side, side), again, atol=1e-4)
    height, width = llamagens.golden()["vq_rect"]
    pixels = np.asarray(model.decode_codes(golden["dec_codes"], height, width))
    np.testing.assert_allclose(pixels, np.clip(nhwc(golden["decoded"]), -1, 1), atol=1e-4)


@pytest.mark.slow
def test_a_raw_codebook_is_searched_and_decoded_as_it_is():
    """Codes are the nearest of un-normalised rows; what keys are made of has length one all the same."""
    model = llamagens.random("c2i")
    model.config = dataclasses.replace(model.config, vision=dataclasses.replace(model.config.vision, unit_codes=False))
    model.vq.config = model.config.vision
    image = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 8, 10, 3)), jnp.float32)
    raw = model.vq.quant_conv(model.vq.encoder(image))
    rows = np.asarray(model.vq.codes[...])
    nearest = np.square(np.asarray(raw)[..., None, :] - rows).sum(-1).argmin(-1)
    codes, latents = model.encode_images(image)
    np.testing.assert_array_equal(codes, nearest.reshape(2, -1))
    np.testing.assert_allclose(np.linalg.norm(latents, axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(model.codebook, axis=-1), 1, atol=1e-5)
    pixels = jnp.clip(model.vq.decode(jnp.asarray(rows)[nearest]), -1, 1)
    np.testing.assert_allclose(model.decode_codes(codes, 4, 5), pixels, atol=1e-5)


def test_without_a_tokenizer_codes_are_drawn_and_images_are_not(tmp_path):
    model = load_model(llamagens.folder(tmp_path, "c2i_b", "c2i_b.safetensors"))
    codes = llamagens.arrays("c2i_b")["codes"]
    assert model.score(llamagens.arrays("c2i_b")["labels"], codes).shape == (2, 25, 128)
    for use in (
        lambda: model.decode_codes(codes, 5, 5),
        lambda: model.encode_images(np.zeros((1, 80, 80, 3), np.float32)),
    ):
        with pytest.raises(UserError, match=r"no image tokenizer.*vq\.safetensors or vq\*\.pt"):
            use()
    with pytest.raises(UserError, match="holds no image tokenizer"):
        load_tokenizer(tmp_path)
