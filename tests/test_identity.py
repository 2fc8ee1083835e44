"""Identity of images: whatever path leads to them, and wherever they were moved, a store holds each once."""

import contextlib
import dataclasses
import functools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from arrag_jax import build_datastore
from arrag_jax.config import DatastoreConfig
from arrag_jax.data.examples import DUPLICATE
from arrag_jax.errors import UserError
from arrag_jax.models.checkpoint import load_tokenizer
from arrag_jax.retrieval import build
from arrag_jax.store import from_images, segments, writer
from arrag_jax.store.datastore import Datastore
from arrag_jax.store.images import encoder
from helpers import folders, stored
from helpers.folders import contents, write_scenes


@pytest.fixture(scope="module", autouse=True)
def one_model():
    """The tokenizer and its compiled program once for all runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "load_tokenizer", functools.cache(load_tokenizer))
        patch.setattr(from_images, "encoder", functools.cache(encoder))
        yield


@contextlib.contextmanager
def stopped_at(moment: int) -> Iterator[None]:
    """What runs inside must be interrupted when it has made so many files safe, before the next one is."""
    sync, left = os.fsync, iter(range(moment))

    def stopping(handle: int) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        sync(handle)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", stopping)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> DatastoreConfig:
    """Twenty-three scenes, two of them bad."""
    return folders.config(tmp_path_factory.mktemp("folders"))


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory) -> Datastore:
    return folders.built(base, tmp_path_factory.mktemp("stores") / "whole")


@pytest.fixture
def grown(base, whole, tmp_path):
    """Adds a source to a copy of the store."""
    store = tmp_path / "store"
    shutil.copytree(whole.directory, store)

    def add(source: str | Path, **flags) -> Datastore:
        build_datastore.run(dataclasses.replace(base, source=str(source)), str(store), append=True, **flags)
        return Datastore.open(store)

    return add


def duplicates(store: Datastore) -> dict[str, str]:
    return {x: why.removeprefix(DUPLICATE) for x, why in store.bad if why.startswith(DUPLICATE)}


def test_photos_that_were_moved_or_renamed_are_not_added_again(base, whole, grown, tmp_path, capsys):
    """New ones among them are; the same command again adds nothing."""
    moved = tmp_path / "pictures" / "2024"
    shutil.copytree(base.source, moved)
    (moved / "scene_03.png").rename(moved / "beach.png")
    write_scenes(moved, range(30, 32))
    store = grown(moved.parent)
    assert store.sources == [*whole.sources, "2024/scene_30.png", "2024/scene_31.png"]
    names = {f"2024/{'beach.png' if x == 'scene_03.png' else x}": x for x in whole.sources}
    assert duplicates(store) == names
    assert (store.num_duplicates, store.num_bad) == (21, 4)
    assert "21 duplicates are left out" in capsys.readouterr().out
    store.verify()
    before = contents(store.directory)
    grown(moved.parent)
    assert "nothing to add" in capsys.readouterr().out
    assert contents(store.directory) == before


@pytest.mark.slow
def test_stopped_while_duplicates_are_left_out_it_goes_on_to_the_same_bytes(base, whole, tmp_path):
    shutil.copytree(base.source, tmp_path / "moved")
    write_scenes(tmp_path / "moved", range(30, 33))
    config = dataclasses.replace(base, source=str(tmp_path / "moved"))
    shutil.copytree(whole.directory, tmp_path / "wanted")
    build_datastore.run(config, str(tmp_path / "wanted"), append=True)
    wanted = contents(tmp_path / "wanted")
    for moment in range(3, 44, 10):
        store = tmp_path / str(moment)
        shutil.copytree(whole.directory, store)
        with stopped_at(moment):
            build_datastore.run(config, str(store), append=True)
        build_datastore.run(config, str(store), append=True)
        assert contents(store) == wanted, moment


@pytest.mark.slow
def test_they_are_kept_on_demand(base, whole, grown, tmp_path):
    shutil.copytree(base.source, tmp_path / "moved")
    assert grown(tmp_path / "moved").num_images == 21
    store = grown(tmp_path / "moved", keep_duplicates=True)
    assert store.sources == whole.sources * 2
    np.testing.assert_array_equal(store.codes[21:], whole.codes)


def test_whatever_path_leads_to_them_they_are_the_same(base, whole, grown, tmp_path, capsys, monkeypatch):
    """Through a link, from another working directory, from a folder above: nothing is encoded, nothing added."""
    source, before = Path(base.source), contents(whole.directory)
    (tmp_path / "link").symlink_to(source)
    monkeypatch.setattr(from_images, "encoder", None)
    monkeypatch.chdir(source)
    for spelt in (f"{source}/", ".", f"../{source.name}", tmp_path / "link", tmp_path / "link" / ".." / source.name):
        assert contents(grown(spelt).directory) == before
        assert "nothing to add" in capsys.readouterr().out
    (source.parent / "model").rename(tmp_path / "model")  # its folder holds no image
    try:
        assert contents(grown(source.parent).directory) == before
    finally:
        (tmp_path / "model").rename(source.parent / "model")


def test_an_equal_word_for_another_folder_is_another_source(base, tmp_path, monkeypatch):
    """Relative paths that are spelled alike, from two working directories."""
    store = tmp_path / "store"
    for number, folder in enumerate(("one", "two")):
        (tmp_path / folder).mkdir()
        write_scenes(tmp_path / folder / "photos", range(40 + number, 41 + number)).joinpath(
            f"scene_{40 + number}.png"
        ).rename(tmp_path / folder / "photos" / "a.png")
        monkeypatch.chdir(tmp_path / folder)
        build_datastore.run(dataclasses.replace(base, source="photos"), str(store), append=number == 1)
    found = Datastore.open(store)
    assert found.sources == ["a.png", "a.png"]
    assert (found.codes[0] != found.codes[1]).any()
    monkeypatch.chdir(tmp_path / "one")
    build_datastore.run(dataclasses.replace(base, source="photos"), str(store), append=True)
    assert Datastore.open(store).num_images == 2


def test_a_file_that_is_there_twice_is_taken_once(base, tmp_path):
    """Unless it is asked for, or the two say different things; files of one size are not mistaken for copies."""
    source = write_scenes(tmp_path / "photos", range(3))
    for name, words in (("scene_00.png", "a"), ("scene_01.png", "b"), ("scene_02.png", "c")):
        (source / name).with_suffix(".txt").write_text(words)
    for copy, original, words in (("again", 0, "a"), ("other", 1, "x"), ("z", 1, "b")):
        shutil.copy(source / f"scene_{original:02d}.png", source / f"{copy}.png")
        (source / f"{copy}.txt").write_text(words)
    data = bytearray((source / "scene_02.png").read_bytes())
    data[len(data) // 2] ^= 1
    (source / "torn.png").write_bytes(data)
    config = dataclasses.replace(base, source=str(source), max_bad_fraction=0.5, captions=True)
    build_datastore.run(config, str(tmp_path / "once"))
    once = Datastore.open(tmp_path / "once")
    assert once.sources == ["again.png", "other.png", "scene_01.png", "scene_02.png"]
    assert duplicates(once) == {"scene_00.png": "again.png", "z.png": "scene_01.png"}
    build_datastore.run(config, str(tmp_path / "twice"), keep_duplicates=True)
    assert Datastore.open(tmp_path / "twice").num_images == 6
    build_datastore.run(dataclasses.replace(config, captions=False), str(tmp_path / "wordless"))
    assert Datastore.open(tmp_path / "wordless").sources == ["again.png", "other.png", "scene_02.png"]


def merged(stores: list[Datastore], into: Path, **flags) -> Datastore:
    found = segments.merge([Datastore.open(store.directory) for store in stores], into, **flags)
    found.verify()
    return found


def test_a_store_merged_with_itself_is_itself(whole, tmp_path):
    """And with a copy of itself."""
    shutil.copytree(whole.directory, tmp_path / "copy")
    both = merged([whole, whole, Datastore.open(tmp_path / "copy")], tmp_path / "both")
    assert (both.sources, both.bad, both.num_duplicates) == (whole.sources, whole.bad, 42)
    np.testing.assert_array_equal(both.codes, whole.codes)
    assert not both.segments
    doubled = merged([whole, whole], tmp_path / "doubled", keep_duplicates=True)
    assert doubled.sources == whole.sources * 2
    with pytest.raises(UserError, match="something other than these merged stores"):
        merged([whole, whole], tmp_path / "doubled")


@pytest.fixture(scope="module")
def sharing(base, tmp_path_factory) -> Datastore:
    """A store of other shards, half of whose scenes ``whole`` holds, too."""
    folder = tmp_path_factory.mktemp("sharing")
    write_scenes(folder / "more", range(10, 36))
    config = dataclasses.replace(base, source=str(folder / "more"), shard_size=4)
    build_datastore.run(config, str(folder / "store"))
    return Datastore.open(folder / "store")


@pytest.mark.slow
def test_stores_that_share_images_hold_each_once(whole, sharing, tmp_path):
    """Interrupted before any file, the merge goes on to the same bytes."""
    both = merged([whole, sharing], tmp_path / "both")
    new = [name for name in sharing.sources if name not in whole.sources]
    assert both.sources == [*whole.sources, *new]
    rows = [sharing.sources.index(name) for name in new]
    np.testing.assert_array_equal(both.codes, np.concatenate([whole.codes, sharing.codes[rows]]))
    assert duplicates(both) == {name: name for name in sharing.sources if name in whole.sources}
    assert (both.num_duplicates, both.num_bad) == (12, 2)
    wanted = contents(both.directory)
    for moment in range(1, 2 * len(wanted), 9):
        with stopped_at(moment):
            merged([whole, sharing], tmp_path / "stopped")
        merged([whole, sharing], tmp_path / "stopped")
        assert contents(tmp_path / "stopped") == wanted, moment
        shutil.rmtree(tmp_path / "stopped")


@pytest.mark.slow
def test_a_data_sets_images_go_by_their_names(tmp_path):
    """Equal grids and captions of other names are other images; latents and captions of those that stay are theirs."""
    words = [f"picture {i}" for i in range(stored.IMAGES)]
    one = stored.build(tmp_path / "one", words, kept=True)
    settings = dataclasses.replace(one.settings, source="others")
    pictures = stored.StoredImages(one.codes, words)
    two = writer.build_datastore(tmp_path / "two", stored.encoded(pictures, "others"), one.codebook, settings)
    assert merged([one, two], tmp_path / "both").sources == one.sources + two.sources
    settings = dataclasses.replace(one.settings, num_images=4)
    few = writer.build_datastore(tmp_path / "few", stored.encoded(pictures, "pictures"), one.codebook, settings)
    both = merged([few, one], tmp_path / "grown")
    assert (both.sources, both.captions, both.num_duplicates) == (one.sources, one.captions, 4)
    np.testing.assert_array_equal(both.codes, one.codes)
    np.testing.assert_array_equal(both.records("latents"), one.records("latents"))
