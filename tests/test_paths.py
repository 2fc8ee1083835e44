"""Paths that cannot be used are one line; ``~`` is expanded; nothing is written through a link out of the workdir."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from test_help import CONFIGS, keys

from arrag_jax import files
from arrag_jax.config import DatastoreConfig, DrawConfig, RetrievalConfig
from arrag_jax.errors import UserError
from arrag_jax.failures import explanation
from arrag_jax.fields import hints, is_path, local_path
from arrag_jax.figures import grids
from arrag_jax.models.checkpoint import load_model
from arrag_jax.store import segments
from arrag_jax.store.datastore import Datastore
from arrag_jax.training.checkpoint import Checkpoints
from arrag_jax.training.metrics import MetricWriter
from arrag_jax.training.tasks import TASKS
from helpers import running, stored

ADDRESSES = ["ftp://h/x", "abfs://c/x", "http://h/x", "hf:o/n", "HF:o/n", "hf://o/n", "https://h/x", "s3:b"]
FILES = {
    "train": ("emoji_prior.py", ["--workdir"]),
    "generate": ("emoji_daid.py", ["--workdir"]),
    "eval": ("emoji_daid.py", ["--workdir"]),
    "build_datastore": ("emoji_datastore.py", ["--workdir", "--merge"]),
    "build_neighbors": ("emoji_neighbors.py", ["--workdir"]),
    "convert": ("", ["--source", "--target"]),
}
PATHS = [(command, flag) for command, (_, flags) in FILES.items() for flag in flags] + [
    (command, f"--{name}")
    for command, cls in CONFIGS.items()
    if cls is not None
    for name, field in keys(cls, "config")
    if (field.type is not None and "source" in name) or name.rpartition(".")[2] in (
        "model", "store", "data_dir", "init_from", "faid_model", "lora_model"
    )
] + [("train", "--config.options.tokenizer")]  # fmt: skip


def arguments(command: str, flag: str, value: str, tmp_path: Path) -> list[str]:
    """A command line that is right but for this flag."""
    config, flags = FILES[command]
    given = {name: str(tmp_path / name) for name in flags if name != "--merge"} | {flag: value}
    words = [f"{name}={x}" for name, x in given.items()]
    return [f"--config={running.ROOT}/configs/{config}", *words] if config else words


@pytest.fixture
def loop(tmp_path) -> Path:
    """A link that leads to itself."""
    os.symlink("loop", tmp_path / "loop")
    return tmp_path / "loop"


@pytest.mark.parametrize(("command", "flag"), PATHS)
def test_an_address_is_refused_wherever_a_path_is_given(capsys, monkeypatch, tmp_path, command, flag):
    """Unless it is one of object storage: no folder of ``data_dir`` is."""
    more = ["gs://b/x", "s3://b/x"] if flag.endswith("data_dir") else []
    for address in [*ADDRESSES[:: 1 if flag == "--workdir" else 4], *more]:
        done = running.run(capsys, monkeypatch, command, *arguments(command, flag, address, tmp_path))
        running.assert_one_line(done, flag.rpartition(".")[2].strip("-"), f"{address} is an address")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("command", "flag"), PATHS)
def test_a_path_that_cannot_be_looked_at_is_refused_by_its_name(capsys, monkeypatch, tmp_path, loop, command, flag):
    (tmp_path / "file").write_text("")
    wrong = {
        str(loop): errno.ELOOP,
        str(tmp_path / ("x" * 300)): errno.ENAMETOOLONG,
        str(tmp_path / "file" / "x"): errno.ENOTDIR,
    }
    for path, code in wrong.items():
        done = running.run(capsys, monkeypatch, command, *arguments(command, flag, path, tmp_path))
        running.assert_one_line(done, path, os.strerror(code))
    assert {path.name for path in tmp_path.iterdir()} == {"loop", "file"}


@pytest.mark.parametrize("path", ["loop", "", "x" * 300, "pipe"])
def test_a_config_file_that_cannot_be_read_is_one_line(capsys, monkeypatch, tmp_path, loop, path):
    os.mkfifo(tmp_path / "pipe")
    done = running.run(capsys, monkeypatch, "train", f"--config={tmp_path / path}", f"--workdir={tmp_path / 'w'}")
    running.assert_one_line(done, f"config file {tmp_path / path}")


def test_a_name_that_breaks_lines_breaks_no_message(capsys, monkeypatch, tmp_path):
    done = running.run(capsys, monkeypatch, "train", f"--config={tmp_path}/a\nb\x1b[31m.py", "--workdir=w")
    running.assert_one_line(done, "a\\nb\\x1b[31m.py does not exist")


def test_a_workdir_is_looked_at_before_any_work(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    os.symlink(tmp_path / "nowhere", tmp_path / "dangling")
    for name, words in (("file", "cannot be a folder"), ("dangling", "leads to nothing")):
        done = running.run(
            capsys, monkeypatch, "eval", f"--config={running.ROOT}/configs/emoji_daid.py",
            f"--workdir={tmp_path / name}", "--config.model=not/looked/at",
        )  # fmt: skip
        running.assert_one_line(done, str(tmp_path / name), words)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs Linux' /proc")
def test_a_folder_that_takes_no_files_is_one_line(capsys, monkeypatch):
    model = running.ROOT / "arrag_jax" / "assets" / "emoji_janus"
    done = running.run(capsys, monkeypatch, "convert", f"--source={model}", "--target=/proc/x")
    running.assert_one_line(done, "cannot write /proc/x: No such file or directory")
    done = running.run(
        capsys, monkeypatch, "build_datastore", f"--config={running.ROOT}/configs/emoji_datastore.py",
        "--workdir=/proc/x", "--config.data_dir=/proc/y", f"--config.model={model}",
    )  # fmt: skip
    running.assert_one_line(done, "cannot write /proc/y")


def test_home_is_expanded_in_settings_flags_and_the_api(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    store = stored.build(tmp_path / "store")
    made = DrawConfig(model="~/m", retrieval=RetrievalConfig(store="~/store"), lora_model="~")
    assert (made.model, made.lora_model, made.faid_model) == (str(tmp_path / "m"), str(tmp_path), "")
    assert DatastoreConfig(model="m", source="tfds:x", data_dir="~/d").source == "tfds:x"
    assert (
        Datastore.open("~/store").store_fingerprint
        == store.store_fingerprint
        == Datastore.open(made.retrieval.store).store_fingerprint
    )
    with pytest.raises(UserError, match=str(tmp_path / "nothing")):
        load_model("~/nothing")
    done = running.run(capsys, monkeypatch, "build_datastore", "--workdir=~/store", "--verify")
    assert (done.code, str(tmp_path / "store") in done.out) == (0, True)
    (tmp_path / "c.py").write_text("def get_config(x):\n    return {'task': x}\n")
    done = running.run(capsys, monkeypatch, "train", "--config=~/c.py:prior", "--workdir=~/w")
    running.assert_one_line(done, "missing key config.steps")


@pytest.mark.parametrize("path", ["~nobody-of-that-name/x", "a\0b", os.fsdecode(b"caf\xe9")])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(UserError, match="--workdir="):
        local_path(path, "--workdir")


def test_all_that_is_called_a_path_is_marked_as_one():
    for cls in {*filter(None, CONFIGS.values()), *(options for _, options in TASKS.values())}:
        for name, _ in keys(cls, ""):
            if name.rpartition(".")[2] in ("model", "store", "data_dir", "source", "init_from", "base", "tokenizer"):
                owner = cls
                for part in name.split(".")[1:-1]:
                    owner = hints(owner)[part]
                assert is_path(hints(owner)[name.rpartition(".")[2]]), name


CODES = [
    errno.ELOOP, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR,
    errno.EEXIST, errno.ENOENT, errno.EMFILE, errno.EIO, errno.ESTALE, errno.EDQUOT, errno.EFBIG, errno.EBUSY,
]  # fmt: skip


@pytest.mark.parametrize("code", CODES, ids=[errno.errorcode[code] for code in CODES])
def test_every_failure_of_a_file_system_names_path_reason_and_mend(code):
    said = explanation(OSError(code, os.strerror(code), "some/where"))
    before, _, mend = said.partition("; ")
    assert "some/where" in before and os.strerror(code) in before and mend
    assert explanation(RuntimeError(f"INTERNAL: open of some/where: {os.strerror(code)} [os_error_code=1]"))


@pytest.fixture
def outside(tmp_path) -> Path:
    """A folder beside the workdir, with a file in it."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("untouched")
    yield tmp_path / "outside"
    assert {path.name for path in (tmp_path / "outside").iterdir()} == {"file"}
    assert (tmp_path / "outside" / "file").read_text() == "untouched"


def test_a_link_at_the_place_of_a_file_is_replaced(tmp_path, outside):
    workdir = tmp_path / "workdir"
    workdir.mkdir()
    for name in ("record.json", ".record.json.tmp", "picture.png", ".picture.png.tmp", "metrics.jsonl"):
        os.symlink(outside / "file", workdir / name)
    files.write_json(workdir / "record.json", {"a": 1})
    grids.save(workdir / "picture.png", np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(json.JSONDecodeError):
        json.loads((outside / "file").read_text())
    MetricWriter(workdir, 0).close()
    os.remove(workdir / "metrics.jsonl")
    os.symlink(outside / "new", workdir / "metrics.jsonl")
    writer = MetricWriter(workdir, 0)
    writer.scalars(1, {"loss": 1.0})
    writer.close()
    assert not any(path.is_symlink() for path in workdir.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pictures", "tensorboard", "checkpoints", "part-00001"])
def test_a_folder_that_is_a_link_out_of_the_workdir_is_refused(tmp_path, outside, name):
    store = stored.build(tmp_path / "workdir")
    os.symlink(outside, store.directory / name)
    with pytest.raises(UserError, match=f"{name} is a link that leads out of"):
        if name == "part-00001":
            segments.next_segment(store)
        elif name == "checkpoints":
            Checkpoints(store.directory, ("loss", "min"))
        else:
            MetricWriter(store.directory, 0)


def test_a_workdir_that_is_a_link_and_links_within_it_are_fine(tmp_path):
    (tmp_path / "real" / "other").mkdir(parents=True)
    os.symlink(tmp_path / "real", tmp_path / "workdir")
    os.symlink("other", tmp_path / "real" / "pictures")
    assert files.folder_in(tmp_path / "workdir", "pictures").is_dir()
    assert files.folder_in(tmp_path / "workdir", "deep", "er").is_dir()


@pytest.mark.parametrize("kind", ["link", "file", "folder"])
def test_a_whole_folder_takes_the_place_of_anything_and_follows_nothing(tmp_path, outside, kind):
    target = tmp_path / "workdir" / "index"
    target.parent.mkdir()
    if kind == "link":
        os.symlink(outside, target)
        os.symlink(outside, target.with_name(".index.tmp"))
    elif kind == "file":
        target.write_text("")
    else:
        (target / "old").mkdir(parents=True)
    with files.atomic_folder(target, "an index", replace=True) as folder:
        (folder / "new").write_text("")
    assert {path.name for path in target.parent.iterdir()} == {"index"}
    assert not target.is_symlink() and [path.name for path in target.iterdir()] == ["new"]
