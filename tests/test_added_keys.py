"""Keys and captions added to a whole store: the bytes of one built with all at once, at any kill, and nothing else."""

import contextlib
import dataclasses
import runpy
import shutil
import sys
import threading
from pathlib import Path

import pytest

from arrag_jax import build_datastore
from arrag_jax.config import DatastoreConfig, ScannOptions
from arrag_jax.data.emoji.scenes import scene
from arrag_jax.errors import UserError
from arrag_jax.models.checkpoint import load_tokenizer
from arrag_jax.retrieval import index
from arrag_jax.store import building, extension, from_images, shards
from arrag_jax.store.datastore import Datastore
from helpers import folders, working
from helpers.folders import BAD, contents, write_scenes

BOTH = ("codebook", "latent")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DatastoreConfig:
    """23 captioned scenes, two of them bad, in shards of five."""
    config = folders.config(tmp_path_factory.mktemp("folders"))
    for number in range(23):
        (Path(config.source) / f"scene_{number:02d}.txt").write_text(scene("store", number).caption)
    return dataclasses.replace(config, keys=("codebook",))


def built(config: DatastoreConfig, store: Path, **changes) -> Path:
    """A store of two parts: the scenes, then six more that were added to their folder."""
    more = Path(config.source).with_name("more")
    write_scenes(more, range(30, 36))
    for number in range(30, 36):
        (more / f"scene_{number}.txt").write_text(scene("store", number).caption)
    build_datastore.run(dataclasses.replace(config, **changes), str(store))
    build_datastore.run(dataclasses.replace(config, source=str(more), **changes), str(store), append=True)
    return store


@pytest.fixture(scope="module")
def plain(config, tmp_path_factory) -> Path:
    return built(config, tmp_path_factory.mktemp("plain") / "store")


@pytest.fixture(scope="module")
def at_once(config, tmp_path_factory) -> Path:
    return built(config, tmp_path_factory.mktemp("at_once") / "store", keys=BOTH, captions=True)


@pytest.fixture
def store(plain, tmp_path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "store"))


def command(monkeypatch, *arguments: str) -> int:
    """Exit code of ``build_datastore`` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["build_datastore", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("arrag_jax.build_datastore", run_name="__main__")
    return ended.value.code


@pytest.mark.slow
def test_what_is_added_makes_the_bytes_of_a_store_built_with_all_at_once(config, store, at_once):
    """In one step or in two, of all parts; the fingerprint, and with it every index, stays."""
    index.build_index(Datastore.open(store), "codebook", ScannOptions())
    before = Datastore.open(store)
    build_datastore.run(dataclasses.replace(config, keys=BOTH), str(store))
    assert Datastore.open(store).settings.keys == BOTH and not Datastore.open(store).settings.captions
    build_datastore.run(dataclasses.replace(config, captions=True), str(store))  # the latents stay
    after = Datastore.open(store)
    after.verify()
    assert after.store_fingerprint == before.store_fingerprint == Datastore.open(at_once).store_fingerprint
    assert index.is_current(after, "codebook", ScannOptions())
    shutil.rmtree(index.index_directory(after, "codebook"))
    assert contents(store) == contents(at_once)
    build_datastore.run(config, str(store))  # the command that built it finds it whole
    assert contents(store) == contents(at_once)


@pytest.mark.slow
def test_the_command_needs_no_config(config, store, at_once, monkeypatch):
    """The store's own settings count: where its images and its tokenizer are, and how many make a batch."""
    flags = ["--config.keys=codebook,latent", "--config.captions=True", "--config.indexes=latent,codebook"]
    assert command(monkeypatch, *flags, f"--workdir={store}") == 0
    held = Datastore.open(store)
    assert all(index.is_current(held, kind, ScannOptions()) for kind in BOTH)
    for kind in BOTH:
        shutil.rmtree(index.index_directory(held, kind))
    assert contents(store) == contents(at_once)
    assert command(monkeypatch, f"--workdir={store}") == 0  # nothing but an index is missing now
    assert index.is_current(held, "codebook", ScannOptions())
    assert command(monkeypatch, "--config.keys=latent", f"--workdir={store / 'nothing'}") == 2


@pytest.mark.slow
@pytest.mark.long
def test_killed_after_any_write_it_goes_on_and_readers_have_the_old_store_till_then(
    config, store, at_once, monkeypatch
):
    """Every shard's file and every manifest once stands last before a kill."""
    wanted, writers = (
        dataclasses.replace(config, keys=BOTH, captions=True),
        [
            (building, "write_records"),
            (building, "write_lines"),
            (shards, "write_json"),
        ],
    )
    done = False
    for kills in range(100):  # noqa: B007
        left = iter([1])  # writes until the kill

        def killed(write, left=left):
            def once(path, *rest):
                if next(left, None) is None:
                    raise KeyboardInterrupt
                write(path, *rest)

            return once

        with monkeypatch.context() as patch:
            for module, name in writers:
                patch.setattr(module, name, killed(getattr(module, name)))
            with contextlib.suppress(KeyboardInterrupt):
                build_datastore.run(wanted, str(store))
                done = True
        opened = Datastore.open(store)
        opened.verify()
        assert (opened.num_images, len(opened.codes), len(opened.sources)) == (27, 27, 27)
        assert (opened.settings.keys == BOTH) == (opened.settings.captions) == done
        if done:
            break
    assert kills == 2 * (5 + 2) + 2 - 1  # files of both parts' shards, two manifests, the last of which ends it
    assert contents(store) == contents(at_once)


@pytest.mark.slow
def test_an_image_that_is_another_one_now_or_gone_is_named_and_nothing_is_added(config, tmp_path):
    source = Path(shutil.copytree(config.source, tmp_path / "photos"))
    moved = dataclasses.replace(config, source=str(source))
    build_datastore.run(moved, str(tmp_path / "store"))
    settings = Datastore.open(tmp_path / "store").manifest
    shutil.copyfile(source / "scene_01.png", source / "scene_07.png")
    with pytest.raises(UserError, match=r"scene_07.png has other codes than .*store .*holds"):
        build_datastore.run(dataclasses.replace(moved, keys=BOTH), str(tmp_path / "store"))
    (source / "scene_07.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"scene_07.png of .*store .*can no longer be read: empty file"):
        build_datastore.run(dataclasses.replace(moved, keys=BOTH), str(tmp_path / "store"))
    (source / "scene_07.png").unlink()
    with pytest.raises(UserError, match=r"1 images of .*store .*are no longer there \(scene_07.png\)"):
        build_datastore.run(dataclasses.replace(moved, keys=BOTH), str(tmp_path / "store"))
    assert Datastore.open(tmp_path / "store").manifest == settings
    shutil.copyfile(Path(config.source) / "scene_07.png", source / "scene_07.png")
    shutil.copyfile(source / "scene_01.png", source / "scene_00b.png")  # not in the store, and so not looked at
    (source / next(iter(BAD))).unlink()
    build_datastore.run(dataclasses.replace(moved, keys=BOTH), str(tmp_path / "store"))
    assert len(Datastore.open(tmp_path / "store").records("latents")) == 21


@pytest.mark.slow
def test_another_tokenizer_or_other_settings_add_nothing(config, store, tmp_path):
    before = contents(store)
    for changes in ({"shard_size": 7}, {"source": str(Path(config.source).with_name("more"))}):
        with pytest.raises(UserError, match=f"other settings.*{next(iter(changes))}"):
            build_datastore.run(dataclasses.replace(config, keys=BOTH, **changes), str(store))
    assert contents(store) == before


@pytest.mark.slow
def test_several_processes_share_the_shards(config, store, at_once):
    """Each of two writes some, the first one the manifests; the same bytes."""
    tokenizer, errors, engines = load_tokenizer(config.model), [], working.in_threads(2)
    wanted = dataclasses.replace(config, keys=BOTH, captions=True)

    def member(number: int) -> None:
        try:
            from_images.with_what_is_held(wanted, store, tokenizer, engines[number], append=False)
        except BaseException as error:
            errors.append(error)

    members = [threading.Thread(target=member, args=(number,)) for number in range(2)]
    for thread in members:
        thread.start()
    for thread in members:
        thread.join(60)
    assert not errors and not any(thread.is_alive() for thread in members)
    assert contents(store) == contents(at_once)


@pytest.mark.slow
def test_stores_merged_from_other_places_are_added_to_part_by_part(config, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    build_datastore.run(config, str(one))
    build_datastore.run(dataclasses.replace(config, shard_size=9), str(two))
    build_datastore.run(None, str(tmp_path / "merged"), merge=[str(one), str(two)], keep_duplicates=True)
    build_datastore.run(dataclasses.replace(config, keys=BOTH), str(tmp_path / "merged"))
    merged = Datastore.open(tmp_path / "merged")
    merged.verify()
    assert len(merged.records("latents")) == 42
    assert [part.settings.keys for part in (merged, *merged.segments)] == [BOTH, BOTH]


@pytest.mark.slow
def test_a_shard_of_nothing_but_duplicates_is_added_to(config, store, tmp_path):
    source = write_scenes(tmp_path / "same", range(4))
    write_scenes(source, range(50, 52))
    more = dataclasses.replace(config, source=str(source), shard_size=4)
    build_datastore.run(more, str(store), append=True)
    assert Datastore.open(store).segments[-1].num_images == 2
    build_datastore.run(dataclasses.replace(config, keys=BOTH), str(store))
    assert len(Datastore.open(store).records("latents")) == Datastore.open(store).num_images


@pytest.mark.parametrize(
    ("held", "wanted", "all_"),
    [
        (("codebook",), ("latent",), ("codebook", "latent")),
        (("latent",), ("codebook", "latent"), ("codebook", "latent")),
        (("codebook", "latent"), ("latent", "codebook"), ("codebook", "latent")),
        (("codebook", "latent"), ("latent",), ("codebook", "latent")),
    ],
)
def test_kinds_are_added_and_never_taken_away(held, wanted, all_):
    assert extension.all_keys(held, wanted) == all_
