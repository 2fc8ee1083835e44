"""Any data set that TFDS has prepared becomes a store: its ids, its captions, its images fitted to the tokenizer."""

import dataclasses
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from arrag_jax import build_datastore, build_neighbors
from arrag_jax.config import DatastoreConfig, NeighborsConfig, RetrievalConfig
from arrag_jax.data import pixels
from arrag_jax.data.stated_rights import Rights
from arrag_jax.errors import UserError
from arrag_jax.models.checkpoint import load_tokenizer
from arrag_jax.nn.vq import from_uint8
from arrag_jax.retrieval import neighbor_sets
from arrag_jax.store.datastore import Datastore
from arrag_jax.store.images import encoder
from arrag_jax.store.neighbor_set import NeighborSet
from helpers import folders, malformed
from helpers.stored import assert_nearest, one_cell_off

FILES = [malformed.encoded("PNG", malformed.photo(size=(20 + i, 31), seed=i)) for i in range(6)]
FILES[4] = b"no image"


class Pets(tfds.core.GeneratorBasedBuilder):
    """Pictures of many sizes, the fifth of them damaged."""

    url_infos = None
    VERSION = tfds.core.Version("1.2.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="small"), tfds.core.BuilderConfig(name="wordless")]  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        small = {name: tfds.features.Text() for name in ("caption", "license")}
        words = small if self.builder_config.name == "small" else {}
        features = {"image": tfds.features.Image(shape=(None, None, 3)), **words}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        small = [{"caption": f"pet {i}", "license": "CC0" if i % 2 else ""} for i in range(len(FILES))]
        words = small if self.builder_config.name == "small" else [{}] * len(FILES)
        for i, file in enumerate(FILES):
            yield i, {"image": io.BytesIO(file), **words[i]}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DatastoreConfig:
    folder = tmp_path_factory.mktemp("prepared")
    for name in ("small", "wordless"):
        Pets(config=name, data_dir=str(folder / "data"), file_format="array_record").download_and_prepare()
    base = folders.config(folder)
    return dataclasses.replace(
        base,
        source="tfds:pets/small",
        split="train",
        data_dir=str(folder / "data"),
        max_bad_fraction=0.2,
        captions=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("source", ["tfds:pets/small", "tfds:pets/small:1.2.0"])
def test_a_prepared_set_becomes_a_store(config, tmp_path, source):
    build_datastore.run(dataclasses.replace(config, source=source), str(tmp_path / "store"))
    store, tokenizer = Datastore.open(tmp_path / "store"), load_tokenizer(config.model)
    good = [0, 1, 2, 3, 5]
    assert store.sources == [f"{source}/train/{i}" for i in good]
    assert store.captions == [f"pet {i}" for i in good]
    assert store.bad == [(f"{source}/train/4", "not an image that PIL reads")]
    images = np.stack([pixels.decode(FILES[i], tokenizer.image_size) for i in good])
    codes, _ = tokenizer.encode_images(from_uint8(images))
    np.testing.assert_array_equal(store.codes.reshape(5, -1), codes)
    assert "tensorflow" not in sys.modules
    build_datastore.run(dataclasses.replace(config, source=source), str(tmp_path / "store"), append=True)
    assert not list(Path(tmp_path / "store").glob("part-*"))


@pytest.mark.slow
def test_a_prepared_set_states_licences(config, tmp_path):
    store = folders.built(dataclasses.replace(config, rights=True), tmp_path / "store")
    assert store.rights == {f"tfds:pets/small/train/{i}": Rights("cc0") for i in (1, 3, 5)}
    wordless = dataclasses.replace(config, source="tfds:pets/wordless", captions=False, rights=True)
    with pytest.raises(UserError, match="has no feature with a licence or a source"):
        build_datastore.run(wordless, str(tmp_path / "none"))


@pytest.mark.slow
def test_neighbors_of_a_prepared_set(config, tmp_path, monkeypatch):
    """A slice's images go by their numbers in the whole split, so that each is left out, however it is encoded."""
    build_datastore.run(config, str(tmp_path / "store"))
    store = Datastore.open(tmp_path / "store")
    monkeypatch.setattr(neighbor_sets, "encoder", lambda tokenizer: one_cell_off(encoder(tokenizer)))
    retrieval, source = RetrievalConfig(str(tmp_path / "store"), k=2, search="dense"), (config.source, config.data_dir)
    sets = NeighborsConfig(
        config.model, retrieval, "train[2:]", "train[:2]", *source, max_bad_fraction=0.3, batch_size=4
    )
    build_neighbors.run(sets, str(tmp_path / "sets"))
    for name, numbers in (("train", [2, 3, 5]), ("valid", [0, 1])):
        for i, example in zip(numbers, NeighborSet.open(tmp_path / "sets" / name), strict=True):
            assert example["caption"] == f"pet {i}"
            assert_nearest(example, store, store.sources.index(f"tfds:pets/small/train/{i}"))
    with pytest.raises(UserError, match="it has no Text feature 'caption'"):
        build_neighbors.run(dataclasses.replace(sets, source="tfds:pets/wordless"), str(tmp_path / "none"))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"source": "tfds:dogs"},
            "source=tfds:dogs with data_dir=.* cannot be read: Could not find dataset files for: dogs",
        ),
        ({"source": "tfds:pets/small:9.0.0"}, "cannot be read: Could not find dataset files"),
        ({"source": "tfds:no name"}, "cannot be read: Parsing builder name string no name failed"),
        ({"split": "valid"}, r"cannot be read: Unknown split 'valid'\. Should be one of \['train'\]"),
        ({"split": "train[:0]"}, r"cannot be read: split train\[:0\] is empty"),
        ({"source": "tfds:pets/wordless"}, "cannot be read: it has no Text feature 'caption' among image"),
    ],
)
def test_what_is_not_there_is_told_before_anything_is_written(config, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        build_datastore.run(dataclasses.replace(config, **changes), str(tmp_path / "store"))
    assert not (tmp_path / "store").exists()
