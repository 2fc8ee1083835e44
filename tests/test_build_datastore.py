"""The command: images → tokenizer → store → index, against the same steps done by hand."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from arrag_jax import build_datastore
from arrag_jax.config import DatastoreConfig, RetrievalConfig, ScannOptions
from arrag_jax.data.emoji import scenes
from arrag_jax.errors import UserError
from arrag_jax.models.checkpoint import save_model
from arrag_jax.models.janus import VISION, Janus
from arrag_jax.models.presets import JanusConfig
from arrag_jax.nn.layer import LlamaConfig
from arrag_jax.nn.vq import VQConfig
from arrag_jax.retrieval import index
from arrag_jax.retrieval.load import load_retriever
from arrag_jax.store.datastore import Datastore
from helpers import folders, tiny
from helpers.stored import values_of

MODEL = JanusConfig(
    language=LlamaConfig(vocab_size=8, width=16, layers=1, heads=2, kv_heads=2, mlp=16),
    vision=VQConfig(codebook_size=32, channels=4, multipliers=(1, 1), z_channels=8, res_blocks=1, norm_scope="pixel"),
    grid=(24, 24),
    head_width=8,
    pad_id=0,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[Janus, str]:
    """A tokenizer, and its folder."""
    model, directory = tiny.janus(config=MODEL, parts=VISION), tmp_path_factory.mktemp("model")
    save_model(model, directory)
    return model, str(directory)


@pytest.fixture(scope="module")
def config(model, tmp_path_factory) -> DatastoreConfig:
    return DatastoreConfig(
        model=model[1],
        source="emoji_scenes/tiny",
        data_dir=str(tmp_path_factory.mktemp("data")),
        num_images=11,
        batch_size=4,
        shard_size=6,
        keys=("codebook", "latent"),
        indexes=("codebook", "latent"),
    )


@pytest.fixture(scope="module")
def store(config, tmp_path_factory) -> Datastore:
    return folders.built(config, tmp_path_factory.mktemp("built") / "store")


@pytest.mark.slow
def test_holds_the_codes_of_the_scenes(store, model):
    pictures = np.stack([scenes.render(scenes.scene("store", i)) for i in range(11)])
    codes, latents = model[0].encode_images(jnp.asarray(pictures, jnp.float32) / 127.5 - 1)
    np.testing.assert_array_equal(store.codes.reshape(11, -1), codes)
    np.testing.assert_allclose(store.records("latents"), latents, atol=1e-3)  # float16
    np.testing.assert_array_equal(store.codebook, model[0].codebook)
    assert store.sources[10] == "emoji_scenes/tiny/store/10"
    store.require_tokenizer(model[0].fingerprint)
    store.verify()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["codebook", "latent"])
@pytest.mark.parametrize("num_images", [0, 5])
def test_loaded_searches_agree(store, model, kind, num_images):
    """The index that the command built (exact at this size) = the dense search."""
    context = jnp.asarray(np.random.default_rng(0).integers(0, 32, (6, 4)), jnp.int32)
    config = RetrievalConfig(store=str(store.directory), k=4, keys=kind, num_images=num_images)
    found = [
        load_retriever(dataclasses.replace(config, search=search), model[0].fingerprint)[1].search(context)
        for search in ("scann", "dense")
    ]
    np.testing.assert_allclose(found[0].distance, found[1].distance, atol=1e-5)
    part = store.subset(num_images or 11)
    for neighbors in found:
        np.testing.assert_array_equal(neighbors.code, values_of(part)[np.asarray(neighbors.id)])


def test_second_run_writes_nothing(store, config, capsys):
    before = {path: path.stat().st_mtime_ns for path in store.directory.rglob("*")}
    build_datastore.run(config, str(store.directory))
    assert {path: path.stat().st_mtime_ns for path in store.directory.rglob("*")} == before
    assert "is complete: 11 images, 5,566 patches" in capsys.readouterr().out


@pytest.mark.slow
def test_other_index_options_build_the_index_again(store, config):
    tree = ScannOptions(exhaustive_below=0, leaves=4)
    assert not index.is_current(store, "latent", tree)
    build_datastore.run(dataclasses.replace(config, scann=tree), str(store.directory))
    assert index.is_current(store, "latent", tree)
    build_datastore.run(config, str(store.directory))
    assert index.is_current(store, "latent", config.scann)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_images": 7}, "other settings.*num_images"),
        ({"split": "nowhere"}, "other settings.*split"),
        ({"model": "nowhere"}, "nowhere is no checkpoint"),
    ],
)
def test_user_errors_touch_nothing(store, config, changes, message):
    before = {path: path.stat().st_mtime_ns for path in store.directory.rglob("*")}
    with pytest.raises(UserError, match=message):
        build_datastore.run(dataclasses.replace(config, **changes), str(store.directory))
    assert {path: path.stat().st_mtime_ns for path in store.directory.rglob("*")} == before


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_images": 65}, "it has 64"),
        ({"split": "nowhere"}, "unknown split"),
        ({"source": "nowhere"}, "config.source=nowhere does not exist"),
    ],
)
def test_a_source_that_does_not_do_leaves_no_folder(config, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        build_datastore.run(dataclasses.replace(config, **changes), str(tmp_path / "store"))
    assert not (tmp_path / "store").exists()


def test_images_of_another_size_are_refused(config, model, tmp_path):
    shutil.copytree(model[1], tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_grid": [6, 6]}))
    with pytest.raises(UserError, match=r"\(48, 48, 3\).*\(12, 12, 3\)"):
        build_datastore.run(dataclasses.replace(config, model=str(path.parent)), str(tmp_path / "store"))
    assert not (tmp_path / "store").exists()


def test_contradictory_config_is_refused():
    with pytest.raises(UserError, match="indexes"):
        DatastoreConfig(model="m", source="s", indexes=("latent",))
