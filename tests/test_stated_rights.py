"""Licences and sources that a data set states are stored with its images, whatever form it has."""

import dataclasses
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from arrag_jax import build_datastore
from arrag_jax.config import DatastoreConfig, RetrievalConfig
from arrag_jax.data import sources
from arrag_jax.data.sidecars import LONGEST_JSON
from arrag_jax.data.stated_rights import Rights, agreed, line_of, rights_in, rights_of
from arrag_jax.errors import UserError
from arrag_jax.models.checkpoint import save_model
from arrag_jax.models.janus import VISION
from arrag_jax.retrieval.load import load_retriever
from arrag_jax.store import forgetting, rights, segments, writer
from arrag_jax.store.datastore import Datastore
from helpers import folders, tables, tiny
from helpers.folders import built, contents

PHOTOS = tables.scenes(11)
LICENCES = ["CC0", "cc-by ", None, "cc0", ""] + ["cc-by"] * 6
STATED = [{"license": licence, "url": f"https://example.org/{i}"} for i, licence in enumerate(LICENCES)]
EXPECTED = [Rights((licence or "").strip().lower(), f"https://example.org/{i}") for i, licence in enumerate(LICENCES)]


def form(folder: Path, kind: str) -> str:
    """The photos with what is stated of them: in .json files beside them, in a tar, or in a Parquet file."""
    names = [(name, data, json.dumps(each).encode()) for (name, data, _), each in zip(PHOTOS, STATED, strict=True)]
    path = folder / f"one.{kind}"
    if kind == "folder":
        path.mkdir()
        for name, data, stated in names:
            (path / f"{name}.png").write_bytes(data)
            (path / f"{name}.json").write_bytes(stated)
    elif kind == "tar":
        with tarfile.open(path, "w") as tar:
            for name, *both in names:
                for ending, data in zip(("png", "json"), both, strict=True):
                    member = tarfile.TarInfo(f"{name}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    else:
        columns = {"jpg": [data for _, data, _ in PHOTOS], "key": [name for name, _, _ in PHOTOS]}
        tables.write(path, columns | {name: [each[name] for each in STATED] for name in ("license", "url")})
    return str(path)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DatastoreConfig:
    folder = tmp_path_factory.mktemp("rights")
    save_model(tiny.janus(parts=VISION), folder / "model")
    source = form(folder, "folder")
    return DatastoreConfig(str(folder / "model"), source, batch_size=4, shard_size=5, indexes=(), rights=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_every_form_states_the_same_and_changes_nothing_else(config, tmp_path, kind):
    config = dataclasses.replace(config, source=form(tmp_path, kind))
    store = built(config, tmp_path / "store")
    assert [store.rights[name] for name in store.sources] == EXPECTED
    assert not (store.directory / rights.RIGHTS).exists()
    without = built(dataclasses.replace(config, rights=False), tmp_path / "without")
    assert store.store_fingerprint == without.store_fingerprint
    for name in without.files:
        assert (store.directory / name).read_bytes() == (without.directory / name).read_bytes()
    limited = RetrievalConfig(str(store.directory), 5, search="dense", licences=("CC0",))
    found, _ = load_retriever(limited, store.settings.fingerprint)
    assert np.flatnonzero(found.shown).tolist() == [0, 3]


@pytest.mark.slow
def test_pieces_appended_merged_or_purged_hold_what_is_stated(config, tmp_path, monkeypatch):
    """Images that are added bring their rights; what was recorded later goes first; a merge carries both."""
    before, killed = contents(built(config, tmp_path / "store").directory), []

    def write_file(path, kind, items):
        killed.append(kind)
        if len(killed) == 5:
            raise KeyboardInterrupt
        write(path, kind, items)

    write = writer.write_file
    monkeypatch.setattr(writer, "write_file", write_file)
    with pytest.raises(KeyboardInterrupt):
        built(config, tmp_path / "both")
    store = built(config, tmp_path / "both")
    assert {k: v for k, v in contents(store.directory).items() if k != "manifest.json"} == {
        k: v
        for k, v in before.items()
        if k != "manifest.json"  # which names the command
    }
    more = folders.write_scenes(tmp_path / "more", range(20, 24))
    for path in sorted(more.iterdir()):
        path.with_suffix(".json").write_text('{"licence": "pd"}')
    second = dataclasses.replace(config, source=str(more))
    build_datastore.run(second, str(store.directory), append=True)
    store = Datastore.open(store.directory)
    assert [each.licence for each in store.rights.values()].count("pd") == 4
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps({"image": store.sources[0], "licence": "mit"}) + "\n")
    build_datastore.run(None, str(store.directory), rights=str(lines))
    merged = segments.merge([built(config, tmp_path / "one"), Datastore.open(store.directory)], tmp_path / "merged")
    assert merged.num_images == 15
    # the first image is in both stores, which say otherwise of it
    assert merged.rights == {**Datastore.open(store.directory).rights, store.sources[0]: Rights()}
    forgetting.forget(store.directory, [store.sources[1], store.sources[13]])
    purged = forgetting.purge(store.directory)
    assert {name: each.licence for name, each in purged.rights.items()}[store.sources[0]] == "mit"
    assert not {store.sources[1], store.sources[13]} & purged.rights.keys()
    assert len(purged.rights) == 13


def test_a_store_with_rights_and_one_without_do_not_join(config, tmp_path):
    store, plain = built(config, tmp_path / "store"), dataclasses.replace(config, rights=False)
    assert contents(built(plain, store.directory).directory) == contents(store.directory)  # it is complete
    more = folders.write_scenes(tmp_path / "more", range(20, 24))
    with pytest.raises(UserError, match=r"or first run: this command again with --config.rights=True"):
        build_datastore.run(dataclasses.replace(plain, source=str(more)), str(store.directory), append=True)
    other = built(plain, tmp_path / "plain")
    with pytest.raises(UserError, match="was built without rights; record them: --rights=FOLDER"):
        build_datastore.run(config, str(other.directory))
    with pytest.raises(UserError, match="has rights=True, the images to add have False"):
        segments.merge([store, other], tmp_path / "merged")


@pytest.mark.parametrize(
    ("stated", "found"),
    [
        ({"license": "CC0", "licence": " "}, Rights("cc0", "")),
        ({"LICENSE_NAME": b"MIT", "URL": "u\n v"}, Rights("mit", "u v")),
        ({"source": 7, "original_url": "u"}, Rights("", "u")),
        ({"caption": "a cat"}, Rights()),
    ],
)
def test_rights_are_read_and_kept_as_lines(stated, found):
    assert rights_of(stated) == found == rights_in(line_of(found), "it")
    assert "\n" not in line_of(found)


def test_images_of_one_name_have_rights_if_they_agree():
    pairs = [("a", Rights("cc0")), ("b", Rights("cc0")), ("a", Rights("cc0")), ("b", Rights()), ("c", Rights())]
    assert agreed(pairs) == {"a": Rights("cc0")}


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        (b"[" * 10**5, "its rights in photo.json cannot be read: it is nested too deeply"),
        (b'{"license": "%s"}' % (b"x" * LONGEST_JSON), "its rights in photo.json cannot be read: it is longer"),
        (b'{"license"', "its rights in photo.json cannot be read: it is not JSON"),
    ],
)
def test_rights_that_cannot_be_read_are_a_fault_of_the_image(tmp_path, beside, message):
    for name in ("photo", "other"):
        (tmp_path / f"{name}.png").write_bytes(PHOTOS[0][1])
    (tmp_path / "other.json").write_text('{"license": "cc0"}')
    (tmp_path / "photo.json").write_bytes(beside)
    faults = {entry.id: entry.fault for entry in sources.list_source(str(tmp_path), rights=True).entries}
    assert faults["photo.png"].startswith(message) and not faults["other.png"]


def test_a_source_that_states_nothing_is_refused(tmp_path):
    (tmp_path / "photo.png").write_bytes(PHOTOS[0][1])
    (tmp_path / "photo.json").write_text('["cc0"]')
    with pytest.raises(UserError, match="states no licence or source of an image"):
        sources.list_source(str(tmp_path), rights=True)
