"""Neighbours of a folder's pictures, of a tar's: equal to brute force, to the byte whenever killed; faults are told."""

import contextlib
import dataclasses
import itertools
import tarfile
from pathlib import Path

import numpy as np
import pytest

from arrag_jax import build_datastore, build_neighbors, files
from arrag_jax.config import DatastoreConfig, NeighborsConfig, RetrievalConfig
from arrag_jax.data.emoji.scenes import scene
from arrag_jax.errors import UserError
from arrag_jax.models.checkpoint import load_tokenizer
from arrag_jax.retrieval import neighbor_sets
from arrag_jax.retrieval.load import load_retriever
from arrag_jax.store.building import BUILDING
from arrag_jax.store.datastore import Datastore
from arrag_jax.store.images import LISTING, encoder, names_below, names_in
from arrag_jax.store.neighbor_set import NeighborSet
from helpers import folders
from helpers.stored import assert_nearest, one_cell_off

pytestmark = pytest.mark.usefixtures("small_calls")

BAD = [
    ("scene_05.png", "empty file"),
    ("scene_07.png", "it has no caption"),
    ("scene_11.png", "not an image that PIL reads"),
]
TRAIN = [f"scene_{i:02d}.png" for i in range(15) if i not in (5, 7, 11)]
IN_TAR = [f"web.tar!scene_{i}.png" for i in range(15, 20)]
VALID = [*(f"scene_{i}.png" for i in range(20, 23)), *IN_TAR]


def caption(id_: str) -> str:
    return scene("store", int(id_.removesuffix(".png")[-2:])).caption


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> NeighborsConfig:
    """Twenty-three scenes, five of them in a tar, one without its caption, and their store, begun by another path."""
    folder = tmp_path_factory.mktemp("files")
    base = folders.config(folder)
    photos = Path(base.source)
    for picture in photos.iterdir():
        picture.with_suffix(".txt").write_text(caption(picture.name))
    (photos / "scene_07.txt").unlink()
    with tarfile.open(photos / "web.tar", "w") as tar:
        for path in sorted(photos.glob("scene_1[5-9].*")):
            tar.add(path, path.name)
            path.unlink()
    build_datastore.run(dataclasses.replace(base, source=f"{photos}/../photos"), str(folder / "store"))
    return NeighborsConfig(
        base.model,
        RetrievalConfig(str(folder / "store"), k=3, search="dense"),
        "train[:-8]",
        "train[-8:]",
        str(photos),
        max_bad_fraction=0.25,
        batch_size=4,
        shard_size=6,
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("sets") / "whole"
    build_neighbors.run(config, str(workdir))
    return workdir


def test_equals_brute_force_without_the_own_image(config, whole):
    store = Datastore.open(config.retrieval.store)
    for name, ids, bad in (("train", TRAIN, BAD), ("valid", VALID, [])):
        found = NeighborSet.open(whole / name)
        assert (len(found), found.bad) == (len(ids), bad)
        found.verify()
        for id_, example in zip(ids, found, strict=True):
            own = store.sources.index(id_)
            np.testing.assert_array_equal(example["codes"], store.codes[own].reshape(-1))
            assert example["caption"] == caption(id_)
            assert_nearest(example, store, own)
    assert sorted(path.name for path in whole.iterdir()) == ["train", "valid"]


@pytest.mark.slow
@pytest.mark.parametrize("source, valid", [(".", VALID), ("web.tar", IN_TAR[-2:])])
def test_an_image_encoded_a_little_differently_is_still_itself(config, tmp_path, monkeypatch, source, valid):
    """As in another batch or on another device; the tar alone is a source, too."""
    monkeypatch.setattr(neighbor_sets, "encoder", lambda tokenizer: one_cell_off(encoder(tokenizer)))
    slices = {"train_split": f"train[:-{len(valid)}]", "valid_split": f"train[-{len(valid)}:]"}
    build_neighbors.run(dataclasses.replace(config, source=str(Path(config.source) / source), **slices), str(tmp_path))
    store = Datastore.open(config.retrieval.store)
    for id_, example in zip(valid, NeighborSet.open(tmp_path / "valid"), strict=True):
        own = store.sources.index(id_)
        assert (example["codes"] != store.codes[own].reshape(-1)).sum() == 1
        assert_nearest(example, store, own)


def test_names_tell_equal_paths_below_two_sources_apart(config, tmp_path):
    """A store of two folders that hold files of the same name; a subset has the names of its images."""
    for name, numbers in (("one", range(3)), ("two", range(12, 14))):
        for number, path in enumerate(sorted(folders.write_scenes(tmp_path / name, numbers).iterdir())):
            path.rename(path.with_name(f"scene_{number:02d}.png"))
        store = DatastoreConfig(config.model, str(tmp_path / name), batch_size=4, indexes=())
        build_datastore.run(store, str(tmp_path / "store"), append=name == "two")
    ids = [("one", 0), ("one", 1), ("one", 2), ("two", 0), ("two", 1)]
    names = [f"{tmp_path.resolve()}/{folder}/scene_{i:02d}.png" for folder, i in ids]
    assert names_in(Datastore.open(tmp_path / "store")) == names
    assert names_in(Datastore.open(tmp_path / "store").subset(4)) == names[:4]
    assert names_below(str(tmp_path / "two"))("scene_00.png") == names_below(str(tmp_path))("two/scene_00.png")


def interrupted(config: NeighborsConfig, workdir: Path, writes: int) -> bool:
    """Runs the command until it has written so often, unless it is done before; tells which."""
    left, sync = iter(range(writes)), files.sync

    def stopping(path: Path) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        sync(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "sync", stopping)
        with contextlib.suppress(KeyboardInterrupt):
            build_neighbors.run(config, str(workdir))
            return False
    return True


@pytest.mark.slow
@pytest.mark.long
def test_killed_before_any_file_it_goes_on_to_the_same_bytes(config, whole, tmp_path, monkeypatch):
    """Also if a picture has come into the folder meanwhile: the list made at the start counts."""
    tokenizer = load_tokenizer(config.model)
    encode, found = encoder(tokenizer), load_retriever(config.retrieval, tokenizer.fingerprint)
    for name, made in (("load_tokenizer", tokenizer), ("encoder", encode), ("load_retriever", found)):  # once for all
        monkeypatch.setattr(neighbor_sets, name, lambda *_, made=made, **__: made)
    expected, late = folders.contents(whole), Path(config.source) / "a_new.png"
    for moment in itertools.count(0, 2):  # a file is synced, then its folder
        workdir = tmp_path / str(moment)
        if not interrupted(config, workdir, moment):
            break
        if (workdir / LISTING).exists() and (workdir / "train" / BUILDING).exists():
            late.write_bytes(b"new")
        build_neighbors.run(config, str(workdir))
        late.unlink(missing_ok=True)
        assert folders.contents(workdir) == expected, moment
    assert moment > len(expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"valid_split": "train[-99:]"},
            r'photos has no train\[-99:\]: its 23 images form one split, "train".*\[-99:23\]',
        ),
        ({"train_split": "train[3:3]"}, r"has no train\[3:3\].*it is empty"),
        ({"train_split": "store"}, "has no store.*Unknown split 'store'"),
        ({"train_split": "train["}, r"has no train\[.*Unrecognized split format"),
        ({"source": "nowhere"}, "config.source=nowhere does not exist"),
        ({"source": "."}, "has no captions"),
    ],
)
def test_what_is_not_there_is_told_before_anything_is_written(config, tmp_path, monkeypatch, changes, message):
    (tmp_path / "a.png").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        build_neighbors.run(dataclasses.replace(config, **changes), str(tmp_path / "sets"))
    assert not (tmp_path / "sets").exists()


@pytest.mark.slow
def test_no_more_bad_images_than_allowed(config, whole, tmp_path):
    with pytest.raises(UserError, match=r"3 of 15 images cannot be read \(scene_05.png: empty file; .*bad_fraction"):
        build_neighbors.run(dataclasses.replace(config, max_bad_fraction=0.1), str(tmp_path))
    build_neighbors.run(config, str(tmp_path))
    assert folders.contents(tmp_path) == folders.contents(whole)
