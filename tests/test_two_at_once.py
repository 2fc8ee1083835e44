"""Of two processes at one folder the second is refused; readers have the old state until the new is whole."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from arrag_jax import files
from arrag_jax.config import RetrievalConfig, ScannOptions
from arrag_jax.errors import UserError
from arrag_jax.models import conversion
from arrag_jax.retrieval import index, load
from arrag_jax.retrieval.load import load_retriever, settled
from arrag_jax.store import segments
from arrag_jax.store.datastore import Datastore
from helpers import children, stored

MODEL = str(Path(__file__).resolve().parents[1] / "arrag_jax" / "assets" / "emoji_janus")


@contextlib.contextmanager
def another_process(directory: Path):
    """Another process that holds a directory."""
    program = (
        "import sys, time; from pathlib import Path; from arrag_jax.files import exclusive_lock\n"
        "with exclusive_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", program, str(directory)]
    process = subprocess.Popen(words, env=children.alone(), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield
    finally:
        process.kill()
        process.communicate()


def test_a_second_build_of_an_index_is_refused_and_changes_nothing(tmp_path):
    store = stored.build(tmp_path / "store")
    place = index.index_directory(store, "codebook").with_name(".index-codebook.tmp")
    place.mkdir()
    (place / "half").write_text("of the other process")
    with another_process(place):
        for build in (index.build_index, index.refresh_index):
            with pytest.raises(UserError, match=r"another process writes an index to .*; wait for it"):
                build(store, "codebook", ScannOptions())
        with pytest.raises(UserError, match="another process builds it; wait for it"):
            load_retriever(RetrievalConfig(str(store.directory), k=4), "f")
        index.build_index(store, "latent", ScannOptions())  # another index is another matter
        assert (place / "half").read_text() == "of the other process"
    index.refresh_index(store, "codebook", ScannOptions())  # a killed one's leftovers are cleared away
    assert index.is_current(store, "codebook", ScannOptions()) and not place.exists()


def test_a_second_conversion_into_one_folder_is_refused_and_mixes_nothing(tmp_path):
    target = tmp_path / "target"
    with files.atomic_folder(target, "a checkpoint") as folder:
        (folder / "one").write_text("first")
        with pytest.raises(UserError, match=r"another process writes a checkpoint to .*target; wait for it"):
            conversion.convert(Path(MODEL), target, "ours")
    assert [path.name for path in target.iterdir()] == ["one"]
    with pytest.raises(UserError, match="in use; choose a new folder"):
        conversion.convert(Path(MODEL), target, "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_what_appears_at_the_target_meanwhile_is_not_overwritten(tmp_path):
    target = tmp_path / "target"
    with pytest.raises(UserError), files.atomic_folder(target, "a checkpoint"):
        target.mkdir()
        (target / "other").write_text("")
    assert [path.name for path in target.iterdir()] == ["other"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_folder_that_is_moved_while_its_lock_is_awaited_is_not_held(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    real = files.fcntl.flock

    def flock(handle, how):
        os.rename(tmp_path / "a", tmp_path / "b")
        real(handle, how)

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with pytest.raises(UserError, match="another process"), files.exclusive_lock(tmp_path / "a"):
        raise AssertionError


def grown(tmp_path: Path) -> tuple[Datastore, Path]:
    """A store with its index, and a part that can be added to it."""
    store = stored.build(tmp_path / "store")
    index.build_index(store, "codebook", ScannOptions())
    return store, stored.build(segments.next_segment(store)).directory


def test_readers_have_the_old_store_while_the_new_index_is_built(tmp_path):
    store, part = grown(tmp_path)
    config, seen = RetrievalConfig(str(store.directory), k=4), []

    @contextlib.contextmanager
    def prepare(new):
        assert new.num_images == 2 * store.num_images and new.store_fingerprint != store.store_fingerprint
        with index.new_index(new, "codebook", ScannOptions()):
            seen.append(load_retriever(config, "f")[0].num_images)
            yield

    after = segments.add_segment(store, part, prepare)
    assert seen == [store.num_images] and after.num_images == 2 * store.num_images
    assert index.is_current(after, "codebook", ScannOptions())
    assert load_retriever(config, "f")[0].num_images == after.num_images
    assert after.store_fingerprint == Datastore.open(store.directory).store_fingerprint


def test_a_part_is_not_added_where_its_index_cannot_be_built(tmp_path):
    store, part = grown(tmp_path)

    @contextlib.contextmanager
    def prepare(new):
        with index.new_index(new, "codebook", ScannOptions()):
            raise UserError("no ScaNN")
        yield

    with pytest.raises(UserError, match="no ScaNN"):
        segments.add_segment(store, part, prepare)
    assert Datastore.open(store.directory).num_images == store.num_images
    assert index.is_current(store, "codebook", ScannOptions())


@pytest.mark.slow
def test_readers_never_fail_while_a_store_grows(tmp_path):
    """Not at any step between the manifest's and the index's replacement, each of which is drawn out."""
    store, part = grown(tmp_path)
    config, stop, sizes, failures = RetrievalConfig(str(store.directory), k=4), threading.Event(), set(), []

    def read():
        while not stop.is_set():
            try:
                sizes.add(load_retriever(config, "f")[0].num_images)
            except UserError as error:
                failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    real = Path.rename
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", lambda *x: (time.sleep(0.2), real(*x), time.sleep(0.2))[1])
        segments.add_segment(store, part, lambda new: index.new_index(new, "codebook", ScannOptions()))
    while 2 * store.num_images not in sizes and not failures:
        time.sleep(0.01)
    stop.set()
    reader.join()
    assert failures == [] and sizes == {store.num_images, 2 * store.num_images}


def test_a_part_added_meanwhile_is_not_lost(tmp_path):
    store, part = grown(tmp_path)
    segments.add_segment(store, part)
    with pytest.raises(UserError, match="another process has changed"):
        segments.add_segment(store, part)  # by one that knows of the old store alone
    assert Datastore.open(store.directory).num_images == 2 * store.num_images


def test_what_nobody_changes_fails_at_once_and_what_changes_is_read_again(tmp_path, monkeypatch):
    store = stored.build(tmp_path / "store")
    calls = []

    def fail():
        calls.append(1)
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        settled(store.directory, fail)
    assert len(calls) == 1
    states = iter([{"a": b"1"}, {"a": b"2"}, {"a": b"2"}, {"a": b"2"}])
    monkeypatch.setattr(load, "_state", lambda _: next(states))
    assert settled(store.directory, lambda: calls.append(1) or len(calls)) == 3
