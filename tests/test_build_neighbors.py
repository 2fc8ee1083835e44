"""The command: scenes → tokenizer → neighbours of other scenes → two sets, against the same steps done by hand."""

import dataclasses
import json

import numpy as np
import pytest
from test_datastore import contents

from arrag_jax import build_datastore, build_neighbors
from arrag_jax.config import DatastoreConfig, NeighborsConfig, RetrievalConfig, ScannOptions
from arrag_jax.data.emoji import scenes
from arrag_jax.errors import UserError
from arrag_jax.models.checkpoint import save_model
from arrag_jax.models.janus import VISION
from arrag_jax.retrieval import neighbor_sets
from arrag_jax.store.building import BUILDING
from arrag_jax.store.datastore import Datastore
from arrag_jax.store.images import encoder
from arrag_jax.store.neighbor_set import NeighborSet, NeighborSettings
from helpers import tiny
from helpers.stored import assert_nearest, one_cell_off

pytestmark = pytest.mark.usefixtures("small_calls")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[NeighborsConfig, Datastore]:
    """A tokenizer, a store of nine scenes, and the config of a set whose training scenes are in that store."""
    root = tmp_path_factory.mktemp("world")
    vision = dataclasses.replace(tiny.CONFIG.vision, codebook_size=32, multipliers=(1, 1, 1))
    model = tiny.janus(config=dataclasses.replace(tiny.CONFIG, vision=vision, grid=(12, 12)), parts=VISION)
    save_model(model, root / "model")
    data = {"model": str(root / "model"), "source": "emoji_scenes/tiny", "data_dir": str(root / "data")}
    store = DatastoreConfig(**data, num_images=9, batch_size=4, indexes=())
    build_datastore.run(store, str(root / "store"))
    retrieval = RetrievalConfig(store=str(root / "store"), k=3, search="dense")
    config = NeighborsConfig(
        **data, retrieval=retrieval, train_split="store[4:8]", valid_split="valid[:3]", batch_size=2, shard_size=3
    )
    return config, Datastore.open(root / "store")


def test_the_command_end_to_end(world, tmp_path, capsys):
    config, store = world
    build_neighbors.run(config, str(tmp_path))
    train, valid = NeighborSet.open(tmp_path / "train"), NeighborSet.open(tmp_path / "valid")
    assert (len(train), len(valid), train.settings.store_images) == (4, 3, 9)
    assert (train.settings.datastore, train.settings.storage) == (store.store_fingerprint, "float32")
    for i, example in enumerate(train):
        np.testing.assert_array_equal(example["codes"], store.codes[4 + i].reshape(-1))
        assert example["caption"] == scenes.scene("store", 4 + i).caption
        assert_nearest(example, store, 4 + i)
    before = contents(tmp_path)
    build_neighbors.run(config, str(tmp_path))
    assert contents(tmp_path) == before
    assert capsys.readouterr().out.count("is complete") == 4


@pytest.mark.slow
def test_an_image_encoded_a_little_differently_is_still_itself(world, tmp_path, monkeypatch):
    """As in another batch or on another device: the store's images, and those of a slice of their split."""
    config, store = world
    monkeypatch.setattr(neighbor_sets, "encoder", lambda tokenizer: one_cell_off(encoder(tokenizer)))
    build_neighbors.run(dataclasses.replace(config, valid_split="store[2:4]+store[8:10]"), str(tmp_path))
    for name, numbers in (("train", [4, 5, 6, 7]), ("valid", [2, 3, 8, 9])):
        for number, example in zip(numbers, NeighborSet.open(tmp_path / name), strict=True):
            if number < 9:
                assert (example["codes"] != store.codes[number].reshape(-1)).sum() == 1
            assert_nearest(example, store, number)


@pytest.mark.parametrize(
    "changes, message",
    [({"valid_split": "nowhere"}, "unknown split"), ({"valid_split": "valid[:2]"}, "other settings.*split")],
)
def test_a_bad_second_split_is_told_before_the_first_is_begun(world, tmp_path, changes, message):
    config, store = world
    (tmp_path / "valid").mkdir()
    other = NeighborSettings(
        fingerprint=store.settings.fingerprint,
        grid=store.settings.grid,
        codebook_size=32,
        k=3,
        keys="codebook",
        search="dense",
        scann=ScannOptions(),
        storage="float32",
        datastore=store.store_fingerprint,
        store_images=9,
        source=config.source,
        split="valid[:3]",
        num_images=3,
        shard_size=3,
    )
    (tmp_path / "valid" / BUILDING).write_text(json.dumps(dataclasses.asdict(other)))
    with pytest.raises(UserError, match=message):
        build_neighbors.run(dataclasses.replace(config, **changes), str(tmp_path))
    assert not (tmp_path / "train").exists()


def test_a_store_of_another_tokenizer_is_refused(world, tmp_path):
    config, store = world
    model = tiny.janus(1, dataclasses.replace(tiny.CONFIG, grid=(12, 12)), VISION)
    save_model(model, tmp_path / "model")
    with pytest.raises(UserError, match=f"{store.settings.fingerprint}.*{model.fingerprint}"):
        build_neighbors.run(dataclasses.replace(config, model=str(tmp_path / "model")), str(tmp_path / "sets"))
    assert not (tmp_path / "sets").exists()
