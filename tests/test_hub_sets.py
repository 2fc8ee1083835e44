"""Data sets and stores by id: what the hub serves is what a folder would be, at one commit."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from arrag_jax import build_neighbors
from arrag_jax.config import DatastoreConfig, NeighborsConfig, RetrievalConfig
from arrag_jax.data import hub_sets
from arrag_jax.data.registry import open_source
from arrag_jax.errors import UserError
from arrag_jax.models.checkpoint import load_tokenizer, save_model
from arrag_jax.models.janus import VISION
from arrag_jax.retrieval.load import load_retriever
from arrag_jax.store.datastore import Datastore
from arrag_jax.store.images import ImageSource
from arrag_jax.store.neighbor_set import NeighborSet, set_in
from helpers import hub_server, running, tables, tiny
from helpers.folders import built, contents

SIZE = (8, 10)
PHOTOS = tables.scenes(9)
FEW = PHOTOS[:6]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with hub_server.served() as hub:
        hub_server.attach(monkeypatch, hub.address, tmp_path / "cache")
        yield hub


CARD = {"configs": [{"config_name": "other", "data_files": "x/*"}, {"config_name": "default", "data_files": [
    {"split": "train", "path": "a/*.parquet"}, {"split": "held_out", "path": ["b/1.parquet", "c/*"]}]}]}  # fmt: skip


@pytest.mark.parametrize(
    "files, head, expected",
    [
        ("data/train-00000-of-00002.parquet data/train-00001-of-00002.parquet data/val-00000-of-00001.parquet", {},
         {"train": 2, "val": 1}),
        ("default/train/0.parquet default/validation/0.parquet README.md x.jpg", {}, {"train": 1, "validation": 1}),
        ("00000.tar 00001.tar 00000.json", {}, {"train": 2}),
        ("my_test_set.tar dev/1.tar training.tar latest.tar", {}, {"test": 1, "validation": 1, "train": 2}),
        ("cats/1.jpg cats/1.txt test/2.jpg .gitattributes .hidden/3.jpg", {}, {"train": 2, "test": 1}),
        ("a/1.parquet a/2.parquet b/1.parquet b/2.parquet c/1.parquet", CARD, {"train": 2, "held_out": 2}),
        ("a/1.parquet train.parquet", {"configs": "?", "license": 3}, {"train": 2}),
        ("README.md data.csv", {}, {}),
    ],
)  # fmt: skip
def test_the_files_of_a_split_are_those_that_the_hub_takes(files, head, expected):
    found = hub_sets.splits_of(files.split(), head)
    assert {split: len(names) for split, names in found.items()} == expected


def push_set(hub, folder):
    """A data set with two splits, of which the card says which is which."""
    tables.write_parquet(folder / "set" / "one.parquet", PHOTOS[:6])
    tables.write_parquet(folder / "set" / "two.parquet", PHOTOS[6:])
    files = [{"split": "train", "path": "one.parquet"}, {"split": "rest", "path": "two.parquet"}]
    card = f"---\nconfigs:\n- config_name: default\n  data_files: {json.dumps(files)}\n---\n# Photos\n"
    (folder / "set" / "README.md").write_text(card)
    return hub.push("datasets/owner/set", hub_server.files_below(folder / "set"))


def test_a_split_is_fetched_when_it_is_opened(hub, tmp_path):
    sha = push_set(hub, tmp_path)
    source = open_source("hf:datasets/owner/set", "", SIZE, captions=True)
    assert source.identity == sha and hub.fetched() == set()
    assert [source.images("train")[i]["caption"] for i in range(6)] == [caption for _, _, caption in PHOTOS[:6]]
    assert hub.fetched() == {"README.md", "one.parquet"}
    assert [source.images("rest[1:]")[i]["caption"] for i in range(2)] == [caption for _, _, caption in PHOTOS[7:]]
    alone = open_source(f"hf:datasets/owner/set@{sha}:rest", "", SIZE, captions=True)
    assert alone.images("train[:2]").source_id(1) == "two.parquet!000000001"
    for name in ("hf:datasets/owner/set:valid", "hf:datasets/owner/set@main:valid"):
        with pytest.raises(UserError, match=r"has no split valid; it has rest, train: write one after a colon"):
            open_source(name, "", SIZE).images("train")
    with pytest.raises(UserError, match=r"write hf:datasets/owner/set"):
        open_source("owner/set", "", SIZE)
    with pytest.raises(UserError, match="names a model, not a dataset; write hf:datasets/OWNER/NAME"):
        DatastoreConfig("model", "hf:owner/set")


@pytest.mark.slow
def test_a_store_of_the_hub_s_model_and_images_names_both_commits(hub, tmp_path, monkeypatch, capsys):
    sha = push_set(hub, tmp_path)
    save_model(tiny.janus(parts=VISION), tmp_path / "model")
    weights = hub.push("owner/name", contents(tmp_path / "model"))
    overrides = {"model": "hf:owner/name", "source": "hf:datasets/owner/set", "captions": True, "batch_size": 4}
    words = [f"--config.{key}={value}" for key, value in (overrides | {"indexes": "()"}).items()]
    words += [f"--config={running.ROOT}/configs/folder_datastore.py", f"--workdir={tmp_path}/store"]
    for photos in (FEW, FEW, PHOTOS):  # the second commit has three more
        more = ["--append"] if photos is PHOTOS else []
        done = running.run(capsys, monkeypatch, "build_datastore", *words, *more)
        assert not done.code and not done.err, done
        store = Datastore.open(tmp_path / "store")  # the same command again keeps its commit
        assert store.num_images == len(photos) and store.captions == [caption for _, _, caption in photos]
        tables.write_parquet(tmp_path / "set" / "one.parquet", PHOTOS)
        hub.push("datasets/owner/set", hub_server.files_below(tmp_path / "set"))
        hub_server.attach(monkeypatch, hub.address, tmp_path / "cache")  # as in another process
    assert store.settings.source == f"hf:datasets/owner/set@{sha}"
    assert store.settings.model == f"hf:owner/name@{weights}"
    assert sha in (store.directory / "manifest.json").read_text()  # whose hash is the store's fingerprint
    assert store.segments[0].settings.source != store.settings.source


def test_offline_a_part_of_a_split_is_not_taken_for_all_of_it(hub, tmp_path, monkeypatch):
    sha = push_set(hub, tmp_path)
    assert len(open_source("hf:datasets/owner/set", "", SIZE).images("train")) == 6
    for again in range(2):
        hub_server.attach(monkeypatch, hub.address, tmp_path / "cache", offline=True)
        source = open_source("hf:datasets/owner/set", "", SIZE)
        with pytest.raises(UserError, match=r"the cache lacks two.parquet, and HF_HUB_OFFLINE is set; run once"):
            source.images("rest")
        if not again:
            assert len(source.images("train")) == 6
            (tmp_path / "cache" / "datasets--owner--set" / "snapshots" / sha / "one.parquet").unlink()
    with pytest.raises(UserError, match=r"the cache lacks one\.parquet"):
        source.images("train")


def test_a_build_goes_on_where_the_cache_is_empty(hub, tmp_path, monkeypatch):
    push_set(hub, tmp_path)
    tokenizer = tiny.janus(parts=VISION)
    arguments = ("hf:datasets/owner/set", "", True, tokenizer)
    first = ImageSource(*arguments, "nothing", tmp_path / "listing")
    first.keep_listing()
    hub_server.attach(monkeypatch, hub.address, tmp_path / "another cache")  # of another machine
    images = ImageSource(*arguments, "begun", tmp_path / "listing").images()
    assert [images[i]["caption"] for i in range(6)] == [caption for _, _, caption in FEW]


@pytest.mark.slow
def test_a_store_by_id_is_searched_as_its_folder_is(hub, tmp_path, monkeypatch):
    model = tiny.janus(parts=VISION)
    save_model(model, tmp_path / "model")
    source = str(tables.write_parquet(tmp_path / "one.parquet", PHOTOS))
    config = DatastoreConfig(str(tmp_path / "model"), source, batch_size=4, shard_size=4, captions=True)
    store = built(config, tmp_path / "store")
    files = {"README.md": b"# A store", ".gitattributes": b"x"}
    hub.push("datasets/owner/store", contents(store.directory) | files)
    hub.push("datasets/owner/both", {f"second/{k}": v for k, v in contents(store.directory).items()} | {"x": b""})
    fingerprint = load_tokenizer(tmp_path / "model").fingerprint
    query = jnp.asarray(np.random.default_rng(0).integers(0, model.codebook_size, (3, 4)))
    for offline in (False, True):
        hub_server.attach(monkeypatch, hub.address, tmp_path / "cache", offline)
        for name in ("hf:datasets/owner/store", "hf:datasets/owner/both:second"):
            found, search = load_retriever(RetrievalConfig(name, k=4), fingerprint)
            assert found.store_fingerprint == store.store_fingerprint
            assert found.captions == store.captions
            expected = load_retriever(RetrievalConfig(str(store.directory), k=4), fingerprint)[1]
            np.testing.assert_array_equal(search.search(query).id, expected.search(query).id)
    assert hub.fetched() == {*contents(store.directory), *(f"second/{name}" for name in contents(store.directory))}
    hub_server.attach(monkeypatch, hub.address, tmp_path / "cache")
    with pytest.raises(
        UserError, match=r"owner/both@\w+ holds no manifest.json; give the id of what was uploaded, and"
    ):
        Datastore.open("hf:datasets/owner/both")
    with pytest.raises(UserError, match=r"hf:datasets/owner/none: .* has no such dataset; check the id"):
        Datastore.open("hf:datasets/owner/none")


@pytest.mark.slow
def test_neighbor_sets_by_id_are_those_of_the_folder(hub, tmp_path):
    save_model(tiny.janus(parts=VISION), tmp_path / "model")
    model, source = str(tmp_path / "model"), str(tables.write_parquet(tmp_path / "one.parquet", PHOTOS))
    built(DatastoreConfig(model, source, batch_size=4, captions=True), tmp_path / "store")
    retrieval = RetrievalConfig(str(tmp_path / "store"), k=2, search="dense")
    build_neighbors.run(NeighborsConfig(model, retrieval, "train[:5]", "train[5:]", source), str(tmp_path / "sets"))
    hub.push("datasets/owner/sets", {f"mine/{name}": x for name, x in contents(tmp_path / "sets").items()})
    for name in ("train", "valid"):
        found = NeighborSet.open(set_in("hf:datasets/owner/sets:mine", name))
        assert found.store_fingerprint == NeighborSet.open(tmp_path / "sets" / name).store_fingerprint
        assert contents(found.directory) == contents(tmp_path / "sets" / name)
    assert set_in("hf:datasets/owner/sets@v1", "train") == "hf:datasets/owner/sets@v1:train"
    with pytest.raises(UserError, match=r"owner/sets@\w+:train holds no manifest.json; give the id of what was"):
        NeighborSet.open(set_in("hf:datasets/owner/sets", "train"))
