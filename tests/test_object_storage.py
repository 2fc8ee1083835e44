"""Folders at addresses of object storage are those of the disk: read, written, killed in the middle and continued.

The storage is moto's S3 server on loopback.
"""

import json
import subprocess
import sys
import time

import numpy as np
import pytest

from arrag_jax import Daid, files, object_storage, object_workdir, sample
from arrag_jax.config import RetrievalConfig
from arrag_jax.data.sources import list_images
from arrag_jax.errors import UserError
from arrag_jax.models.checkpoint import config_of, load_model, save_model
from arrag_jax.retrieval.load import load_retriever
from arrag_jax.store.datastore import Datastore
from arrag_jax.store.neighbor_set import set_in
from helpers import children, running, storage, stored, tiny
from helpers.folders import contents, write_scenes

pytestmark = storage.needs_storage


@pytest.fixture(scope="module")
def s3():
    with storage.served() as variables:
        yield variables


@pytest.fixture
def cache(s3, tmp_path, monkeypatch):
    """An empty cache; this process has listed nothing."""
    storage.forget(monkeypatch, tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model(tiny.janus(), folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images") / "images"
    write_scenes(folder, range(6))
    return folder


def words(model, source, workdir, *more: str) -> list[str]:
    return [
        f"--config={running.ROOT}/configs/folder_datastore.py", f"--config.model={model}", f"--config.source={source}",
        "--config.shard_size=1", "--config.batch_size=1", "--config.indexes=()", f"--workdir={workdir}", *more,
    ]  # fmt: skip


def compared(files: dict[str, bytes]) -> dict[str, object]:
    """The files of a store; of its manifest all but the command, which names --workdir, and the hash over both."""
    manifest = json.loads(files["manifest.json"])
    del manifest["settings"]["command"], manifest["sha256"]
    return files | {"manifest.json": manifest}


def test_a_store_built_at_an_address_is_that_of_a_folder(capsys, monkeypatch, tmp_path, cache, model, images):
    there, local = "s3://bucket/built/store", tmp_path / "local"
    assert running.run(capsys, monkeypatch, "build_datastore", *words(model, images, local)).code == 0
    done = running.run(capsys, monkeypatch, "build_datastore", *words(model, images, there))
    assert done.code == 0, done
    assert compared(storage.content(there)) == compared(contents(local))
    sent = storage.content(there)
    storage.forget(monkeypatch, tmp_path / "another machine")
    done = running.run(capsys, monkeypatch, "build_datastore", *words(model, images, f"{there}/"))  # nothing is left
    assert (done.code, storage.content(there)) == (0, sent)
    assert Datastore.open(there).num_images == Datastore.open(local).num_images


def test_images_and_models_at_addresses_make_the_same_store(capsys, monkeypatch, tmp_path, cache, model, images):
    storage.put(model, "s3://bucket/source/model")
    storage.put(images, "s3://bucket/source/images")
    local, remote = tmp_path / "local", tmp_path / "remote"
    assert running.run(capsys, monkeypatch, "build_datastore", *words(model, images, local)).code == 0
    there = words("s3://bucket/source/model", "s3://bucket/source/images", remote)
    done = running.run(capsys, monkeypatch, "build_datastore", *there)
    assert done.code == 0, done
    made, expected = Datastore.open(remote), Datastore.open(local)
    assert (made.settings.source, made.settings.model) == ("s3://bucket/source/images", "s3://bucket/source/model")
    assert {k: v for k, v in contents(remote).items() if k != "manifest.json"} == {
        k: v for k, v in contents(local).items() if k != "manifest.json"
    }
    assert list(made.sources) == list(expected.sources)


def test_a_model_and_a_store_by_address_draw_the_same_codes(monkeypatch, tmp_path, cache, model):
    store = stored.build(tmp_path / "store", fingerprint=load_model(model).fingerprint)
    storage.put(model, "s3://bucket/read/model")
    storage.put(store.directory, "s3://bucket/read/store")
    drawn = []
    for root in (str(tmp_path), "s3://bucket/read"):
        at = model if root == str(tmp_path) else f"{root}/model"
        opened = load_model(at)
        config = RetrievalConfig(store=f"{root}/store", k=4, search="dense")
        _, retriever = load_retriever(config, opened.fingerprint)
        policy = Daid(weight=0.5, temperature=0.1)
        drawn.append(np.asarray(sample(opened, tiny.prompts((3, 2)), policy=policy, retriever=retriever).codes))
    np.testing.assert_array_equal(*drawn)


def test_what_has_arrived_stays_and_what_has_changed_is_copied_again(monkeypatch, cache, model):
    there, changed = "s3://bucket/changed/model", contents(model)["config.json"] + b"\n"
    storage.put(model, there)
    storage.client().pipe_file(f"{there}/generation_config.json", b"{}")
    storage.client().pipe_file(f"{there}/picture.png", b"which no layout needs")
    config_of(there)
    folder = object_storage.copy_of(there, "copies").folder
    assert contents(folder).keys() == {"config.json", "generation_config.json"}  # a config needs no weights
    load_model(there)
    arrived = {path.name: path.stat().st_ino for path in folder.iterdir()}
    storage.client().pipe_file(f"{there}/config.json", changed)
    (folder / "model.safetensors").write_text("cut")
    storage.forget(monkeypatch, cache)
    load_model(there)
    assert {path.name for path in folder.iterdir() if arrived[path.name] == path.stat().st_ino} == {
        "generation_config.json"
    }
    assert contents(folder) == {**contents(model), "config.json": changed, "generation_config.json": b"{}"}


def test_what_is_gone_at_the_address_is_gone_from_the_copy(monkeypatch, cache, images):
    there = "s3://bucket/gone/images"
    storage.put(images, there)
    listed = [entry.id for entry in list_images(there)]
    assert listed == [entry.id for entry in list_images(str(images))]
    storage.client().rm_file(f"{there}/{listed[0]}")
    storage.forget(monkeypatch, cache)
    assert [entry.id for entry in list_images(there)] == listed[1:]
    assert set_in(there, "train") == f"{there}/train"


def test_a_folder_that_is_replaced_is_whole_or_not_there(tmp_path, cache):
    there, seen = "s3://bucket/whole/run", []
    with object_workdir.opened(there) as folder:
        for text in ("first", "second"):
            with files.atomic_folder(folder / "export", "an export", replace=True) as temporary:
                files.write_json(temporary / "manifest.json", {"text": text})
                (temporary / "weights").write_text(text)
        put = object_workdir.Mirror._put

        def killed(self, name, path):
            seen.append(name)
            if name.endswith("manifest.json"):
                raise KeyboardInterrupt
            return put(self, name, path)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(object_workdir.Mirror, "_put", killed)
            with files.atomic_folder(folder / "export", "an export", replace=True) as temporary:
                files.write_json(temporary / "manifest.json", {"text": "third"})
                (temporary / "weights").write_text("third")
        assert seen == ["export/.unfinished", "export/weights", "export/manifest.json"]
        with pytest.raises(UserError, match="is not finished: a command writes it, or was killed; run that command"):
            object_storage.snapshot(f"{there}/export", "model")
        (folder / "log").write_text("grows")
    assert {name for name in storage.content(there)} == {"export/weights", "export/manifest.json", "log"}
    storage.client().pipe_file(f"{there}/export/.unfinished", b"")
    object_storage._listed_once.cache_clear()
    with object_workdir.opened(there) as folder:
        assert contents(folder) == {"log": b"grows"}
    assert storage.content(there) == {"log": b"grows"}


def test_faults_are_one_line_each(capsys, monkeypatch, tmp_path, cache, model, images):
    store = stored.build(tmp_path / "store")
    storage.put(store.directory, "s3://bucket/half/store")
    missing = next(name for name in contents(store.directory) if name.startswith("codes"))
    storage.client().rm_file(f"s3://bucket/half/store/{missing}")
    with pytest.raises(UserError, match=rf"{missing} has no bytes, not \d+; build it with"):
        Datastore.open("s3://bucket/half/store")
    merged = [f"--merge=s3://bucket/{x}/store" for x in ("half", "half")]
    done = running.run(capsys, monkeypatch, "build_datastore", *merged, f"--workdir={tmp_path / 'both'}")
    running.assert_one_line(done, f"s3://bucket/half/store/{missing} has no bytes, not")
    with pytest.raises(UserError, match=r"s3://bucket/nothing: there is nothing; check the bucket and the path$"):
        load_model("s3://bucket/nothing")
    with pytest.raises(UserError, match=r"holds no manifest.json; give"):
        Datastore.open("s3://bucket/half")
    with pytest.raises(UserError, match=r"names no folder of object storage; write gs://BUCKET/PATH or s3://"):
        load_model("s3://bucket")
    for at in ("source", "workdir"):
        given = {"source": images, "workdir": tmp_path / "w", at: "s3://no-such-bucket/x"}
        done = running.run(capsys, monkeypatch, "build_datastore", *words(model, **given))
        running.assert_one_line(done, "s3://no-such-bucket/x", "bucket does not exist", "check the bucket")
    done = running.run(capsys, monkeypatch, "build_datastore", *words(model, images, "s3://bucket/w", "--ray=local"))
    running.assert_one_line(done, "--workdir=s3://bucket/w is written by one process; leave --ray out")
    with monkeypatch.context() as patch:
        patch.setenv("JAX_NUM_PROCESSES", "2")
        done = running.run(capsys, monkeypatch, "build_datastore", *words(model, images, "s3://bucket/w"))
        running.assert_one_line(done, "this run has several; mount the bucket")
    monkeypatch.setitem(object_storage.PACKAGES, "s3", "no_such_package")
    done = running.run(capsys, monkeypatch, "build_datastore", *words(model, images, "s3://bucket/w"))
    running.assert_one_line(done, "s3:// needs the package no_such_package; pip install 'arrag_jax[storage]'")


def test_no_permission_is_one_line(monkeypatch, cache):
    class Refusing:
        def find(self, *_, **__):
            raise PermissionError("Access Denied")

    monkeypatch.setattr(object_storage, "client", lambda address: Refusing())
    with pytest.raises(UserError, match=r"listing it failed \(Access Denied\); access is refused; give credentials"):
        load_model("s3://bucket/model")


def test_a_storage_address_is_written_by_one_command(monkeypatch, cache):
    there = "s3://bucket/lock/run"
    monkeypatch.setattr(object_workdir, "LEASE", 0.6)

    def refused(said: str) -> None:
        with pytest.raises(UserError, match=said), object_workdir.opened(there):
            pass

    with object_workdir.opened(there):
        refused("another command on this machine writes to s3://bucket/lock/run")
        storage.forget(monkeypatch, cache / "other")
        refused(r"is written by another command \(process \d+ on")
        monkeypatch.setattr(object_workdir, "RENEWED", 0.2)  # for the next
    monkeypatch.setattr(object_workdir, "_machine", lambda: "elsewhere")
    with object_workdir.opened(there) as folder:
        storage.forget(monkeypatch, cache / "third")
        monkeypatch.setattr(object_workdir, "_machine", lambda: "here")
        refused(r"is written by another command \(process \d+ on elsewhere")
        assert folder.exists() is False
    object_workdir._write_lock(there, {"id": "dead", "host": "gone", "pid": 1})
    with object_workdir.opened(there):  # after the lease
        assert object_workdir._read_lock(there)["host"] == "here"
    assert storage.content(there) == {}


def killed(command: list[str], variables: dict[str, str], cache, ready) -> None:
    """Runs a command and kills it as soon as ``ready`` of what is at the address."""
    environment = children.alone() | variables | {object_storage.CACHE: str(cache)}
    process = subprocess.Popen([sys.executable, "-m", *command], env=environment, stderr=subprocess.PIPE, text=True)
    there = command[-1].partition("=")[2]
    while not ready(storage.client().find(there)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()
    process.communicate()


def run_on(command: list[str], variables: dict[str, str], cache) -> subprocess.CompletedProcess:
    environment = children.alone() | variables | {object_storage.CACHE: str(cache)}
    done = subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done
    return done


@pytest.mark.long
@pytest.mark.parametrize("shards", [1, 4])
def test_a_build_that_is_killed_continues_on_a_machine_that_has_nothing(s3, tmp_path, model, images, shards):
    there = f"s3://bucket/killed-{shards}/store"
    command = ["arrag_jax.build_datastore", *words(model, images, there)]
    killed(command, s3, tmp_path / "first", lambda found: sum("/codes-" in name for name in found) >= shards)
    before = storage.content(there)
    assert "manifest.json" not in before
    run_on(command, s3, tmp_path / "second")
    run_on(["arrag_jax.build_datastore", *words(model, images, tmp_path / "local")], s3, tmp_path / "third")
    after = storage.content(there)
    assert compared(after) == compared(contents(tmp_path / "local"))
    assert all(after[name] == data for name, data in before.items() if name.endswith(".arrayrecord"))


@pytest.mark.long
def test_a_training_that_is_killed_continues_on_a_machine_that_has_nothing(s3, tmp_path):
    there = "s3://bucket/trained/run"
    settings = [
        f"--config={running.ROOT}/configs/emoji_tokenizer.py", "--config.data.source=emoji_scenes/tiny",
        f"--config.data.data_dir={tmp_path / 'data'}", "--config.steps=6", "--config.checkpoint_every=1",
        "--config.batch_size=2", "--config.data.eval_examples=2", "--config.eval_every=3", "--config.mesh.data=1",
    ]  # fmt: skip
    run_on(["arrag_jax.train", *settings, f"--workdir={tmp_path / 'local'}"], s3, tmp_path / "none")
    command = ["arrag_jax.train", *settings, f"--workdir={there}"]
    killed(command, s3, tmp_path / "first", lambda found: any("/checkpoints/2/" in name for name in found))
    assert "export/manifest.json" not in storage.content(there)
    run_on(command, s3, tmp_path / "second")
    local, after = contents(tmp_path / "local"), storage.content(there)
    assert after["export/model.safetensors"] == local["export/model.safetensors"]
    steps = {name.split("/")[1] for name in after if name.startswith("checkpoints/")}
    assert steps == {name.split("/")[1] for name in local if name.startswith("checkpoints/")}
    kept = [{x for x in files if not x.startswith(("checkpoints/", "tensorboard/"))} for files in (after, local)]
    assert kept[0] == kept[1]  # Orbax and TensorBoard draw names of files
    lines = [[json.loads(line)["step"] for line in x["metrics.jsonl"].decode().splitlines()] for x in (local, after)]
    assert lines[0] == lines[1]
    run_on(["arrag_jax.convert", f"--source={there}", f"--target={there}-best"], s3, tmp_path / "third")
    run_on(["arrag_jax.convert", f"--source={tmp_path / 'local'}", f"--target={tmp_path / 'best'}"], s3, tmp_path / "x")
    assert storage.content(f"{there}-best")["model.safetensors"] == contents(tmp_path / "best")["model.safetensors"]


@pytest.mark.long
def test_pictures_drawn_at_an_address_are_those_of_a_folder(s3, tmp_path):
    flags = ["--prompt=a cat", "--prompt=two dogs", "--method=plain", "--config.batch_size=1"]
    command = ["arrag_jax.generate", f"--config={running.ROOT}/configs/emoji_daid.py", *flags]
    there = "s3://bucket/drawn/pictures"
    killed([*command, f"--workdir={there}"], s3, tmp_path / "a", lambda found: any(x.endswith(".png") for x in found))
    run_on([*command, f"--workdir={there}"], s3, tmp_path / "b")
    run_on([*command, f"--workdir={tmp_path / 'local'}"], s3, tmp_path / "c")
    after, local = storage.content(there), contents(tmp_path / "local")
    assert after.keys() == local.keys()
    assert {x: y for x, y in after.items() if x.endswith(".png")} == {
        x: y for x, y in local.items() if x.endswith(".png")
    }
