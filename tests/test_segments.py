"""Stores of several parts: added to, merged, verified; the command's forms."""

import dataclasses
import functools
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from arrag_jax import build_datastore
from arrag_jax.config import DatastoreConfig, ScannOptions
from arrag_jax.errors import UserError
from arrag_jax.models.checkpoint import load_tokenizer
from arrag_jax.retrieval import build, index
from arrag_jax.store import segments
from arrag_jax.store.datastore import Datastore
from helpers import folders
from helpers.folders import codes_of, contents, write_scenes


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DatastoreConfig:
    return folders.config(tmp_path_factory.mktemp("folders"))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> Datastore:
    return folders.built(config, tmp_path_factory.mktemp("stores") / "whole")


@pytest.mark.slow
def test_what_is_added_comes_after_and_changes_nothing_before(whole, config, tmp_path, capsys, monkeypatch):
    """Added in two steps, one of them stopped = the images in that order; twice the same adds nothing."""
    source, store = write_scenes(tmp_path / "photos", range(23)), tmp_path / "store"
    growing = dataclasses.replace(config, source=str(source))
    build_datastore.run(growing, str(store))
    before = contents(store)
    build_datastore.run(growing, str(store), append=True)
    assert "nothing to add" in capsys.readouterr().out
    write_scenes(source, range(23, 30))
    with monkeypatch.context() as patch:  # stopped when the part is whole, but not in the manifest yet
        patch.setattr(segments, "write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build_datastore.run(growing, str(store), append=True)
    assert Datastore.open(store).num_images == 21
    other = dataclasses.replace(growing, source=config.source)
    with pytest.raises(UserError, match=r"is what is left of adding .*; run that command again"):
        build_datastore.run(other, str(store), append=True)
    build_datastore.run(growing, str(store), append=True)
    write_scenes(source, range(30, 32))
    build_datastore.run(growing, str(store), append=True)
    build_datastore.run(growing, str(store))  # the first command still finds its store whole
    grown = Datastore.open(store)
    grown.verify()
    assert grown.sources == [*whole.sources, *(f"scene_{i}.png" for i in range(23, 32))]
    np.testing.assert_array_equal(grown.codes, codes_of(config.model, source, grown.sources))
    np.testing.assert_array_equal(grown.subset(25).codes, grown.codes[:25])
    assert grown.bad == whole.bad
    after = contents(store)
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: data for name, data in before.items() if name != "manifest.json"
    }
    with pytest.raises(UserError, match=r"has keys=.*build a store of their own"):
        build_datastore.run(dataclasses.replace(growing, keys=("codebook", "latent")), str(store), append=True)
    part = store / "part-00001" / "manifest.json"
    part.write_text(part.read_text().replace('"split": ""', '"split": "x"'))
    with pytest.raises(UserError, match="part-00001 is not the segment"):
        Datastore.open(store)


def test_the_same_folder_spelt_otherwise_is_the_same_source(whole, config, tmp_path, capsys, monkeypatch):
    """Nothing is added twice, whether the path is relative, linked to, or ends in a slash."""
    store = Path(shutil.copytree(whole.directory, tmp_path / "store"))
    (tmp_path / "link").symlink_to(config.source)
    before = contents(store)
    monkeypatch.setattr(build, "load_tokenizer", functools.cache(load_tokenizer))
    for spelt in (f"{config.source}/", os.path.relpath(config.source), str(tmp_path / "link")):
        build_datastore.run(dataclasses.replace(config, source=spelt), str(store), append=True)
        assert "nothing to add" in capsys.readouterr().out
        build_datastore.run(dataclasses.replace(config, source=spelt), str(store))
    assert contents(store) == before


@pytest.mark.slow
def test_bad_images_are_a_share_of_the_whole_store(whole, config, tmp_path, monkeypatch):
    """Of 23 images 2 were bad; with one more they are 12 % of 25, and the mend of too many mends."""
    monkeypatch.setattr(build, "load_tokenizer", functools.cache(load_tokenizer))
    store, source = Path(shutil.copytree(whole.directory, tmp_path / "store")), tmp_path / "more"
    source.mkdir()
    (source / "a.jpg").write_bytes(b"")
    more = dataclasses.replace(config, source=str(source), max_bad_fraction=0.12)
    with pytest.raises(
        UserError, match=r"3 of 24 images cannot be read \(a.jpg: empty file\), more than .*=0.12 allow"
    ):
        build_datastore.run(more, str(store), append=True)
    with pytest.raises(UserError, match=rf"raise it, or mend them, delete {store / 'part-00001'} and run the same"):
        build_datastore.run(more, str(store), append=True)
    shutil.rmtree(store / "part-00001")
    write_scenes(tmp_path, range(40, 41))
    (tmp_path / "scene_40.png").rename(source / "b.png")
    build_datastore.run(more, str(store), append=True)
    grown = Datastore.open(store)
    assert (grown.num_images, grown.num_bad, grown.sources[-1]) == (22, 3, "b.png")
    (source / "c.jpg").write_bytes(b"")
    build_datastore.run(dataclasses.replace(more, max_bad_fraction=0.2), str(store), append=True)  # nothing good in it
    grown = Datastore.open(store)
    grown.verify()
    assert (grown.num_images, grown.num_bad, len(grown.codes)) == (22, 4, 22)


@pytest.mark.slow
def test_merged_stores_are_one_after_another(whole, config, tmp_path, monkeypatch):
    source = write_scenes(tmp_path / "photos", range(40, 44))
    build_datastore.run(dataclasses.replace(config, source=str(source)), str(tmp_path / "one"))
    write_scenes(source, range(44, 47))
    build_datastore.run(dataclasses.replace(config, source=str(source)), str(tmp_path / "one"), append=True)
    one, merging = Datastore.open(tmp_path / "one"), tmp_path / "both"
    stores = [str(one.directory), str(whole.directory)]

    def merge(into: Path) -> Datastore:
        return segments.merge([Datastore.open(store) for store in stores], into)

    expected = contents(merge(tmp_path / "expected").directory)
    for moment in range(1, len(expected), 4):
        calls, atomic_write = iter(range(moment)), segments.atomic_write

        def stopping(path: Path, calls=calls, atomic_write=atomic_write):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return atomic_write(path)

        with monkeypatch.context() as patch:
            patch.setattr(segments, "atomic_write", stopping)
            try:
                merge(merging)
            except KeyboardInterrupt:
                assert not (merging / "manifest.json").exists()
        merge(merging)
        assert contents(merging) == expected
        shutil.rmtree(merging)
    build_datastore.run(None, str(merging), merge=stores)
    both = Datastore.open(merging)
    both.verify()
    assert both.sources == one.sources + whole.sources
    np.testing.assert_array_equal(both.codes, np.concatenate([one.codes, whole.codes]))
    assert (both.num_bad, both.num_images) == (2, 7 + 21)
    with pytest.raises(UserError, match="something other than these merged stores"):
        segments.merge([one], merging)
    with pytest.raises(UserError, match="is one of the stores to merge"):
        segments.merge([one], one.directory)


@pytest.mark.parametrize("form", [{"append": True}, {"merge": ["x"]}, {}])
def test_forms_of_the_command_exclude_one_another(form, tmp_path):
    with pytest.raises(UserError, match="exclude one another" if form else "missing --config"):
        build_datastore.run(None, str(tmp_path), verify=bool(form), **form)


def test_verify_names_the_damaged_file(whole, tmp_path, capsys):
    for name in contents(whole.directory):
        store = tmp_path / "store"
        shutil.copytree(whole.directory, store)
        build_datastore.run(None, str(store), verify=True)
        assert "is as it was written: 21 images" in capsys.readouterr().out
        data = (store / name).read_bytes()
        place = data.rindex(b"7" if name == "manifest.json" else data[-9:-8])
        (store / name).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(UserError, match=name):
            build_datastore.run(None, str(store), verify=True)
        shutil.rmtree(store)


def test_verify_names_the_damaged_file_of_an_index(whole, tmp_path):
    store = Datastore.open(shutil.copytree(whole.directory, tmp_path / "store"))
    directory = index.build_index(store, "codebook", ScannOptions())
    build_datastore.run(None, str(store.directory), verify=True)
    for path in sorted(path for path in directory.rglob("*") if path.name != "index.json" and path.is_file()):
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if data else b"x")
        with pytest.raises(UserError, match=rf"index file .*{path.name} is damaged; delete .*index-codebook"):
            build_datastore.run(None, str(store.directory), verify=True)
        path.write_bytes(data)
