"""Weights by id: a model of the hub is the model of its folder, from the files that its layout needs, at one commit."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from arrag_jax import huggingface
from arrag_jax.errors import UserError
from arrag_jax.fields import pin
from arrag_jax.models.checkpoint import config_of, load_model, load_tokenizer, save_model
from arrag_jax.models.weights import parameters
from helpers import children, hub_server, running, tiny
from helpers.folders import contents


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model(tiny.janus(), folder)
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with hub_server.served() as hub:
        hub_server.attach(monkeypatch, hub.address, tmp_path / "cache")
        yield hub


def in_shards(folder) -> dict[str, bytes]:
    """The folder's files with its weights in two shards and an index."""
    tensors, shards = load_file(folder / "model.safetensors"), {}
    for number, keys in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        path = folder.parent / "shard"
        save_file({key: tensors[key] for key in keys}, path)
        shards[f"model-0000{number}-of-00002.safetensors"] = (path.read_bytes(), keys)
    index = {"weight_map": {key: name for name, (_, keys) in shards.items() for key in keys}}
    config = {"config.json": (folder / "config.json").read_bytes()}
    return config | {name: data for name, (data, _) in shards.items()} | {
        "model.safetensors.index.json": json.dumps(index).encode()
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one file", "shards", "below"])
def test_a_model_by_id_is_the_model_of_its_folder(hub, folder, layout):
    needed = in_shards(folder) if layout == "shards" else contents(folder)
    below = "weights/" if layout == "below" else ""
    other = {"README.md": b"x", "original/model.bin": b"y", "picture.png": b"z", "consolidated.safetensors": b"w"}
    hub.push("owner/name", {below + name: data for name, data in needed.items()} | other)
    name = f"hf:owner/name{':weights' if below else ''}"
    assert config_of(name) == config_of(folder)
    assert {name for name in hub.fetched() if not name.endswith(".json")} == set()  # a config needs no weights
    found, expected = parameters(load_model(name)), parameters(load_model(folder))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key][...], value[...])
    assert hub.fetched() == {below + name for name in needed}


def test_one_process_sees_one_commit_and_a_revision_names_another(hub, folder):
    first = hub.push("owner/name", contents(folder))
    before = load_tokenizer("hf:owner/name").fingerprint
    save_model(tiny.janus(seed=1), folder.parent / "second")
    second = hub.push("owner/name", contents(folder.parent / "second"))
    assert load_tokenizer("hf:owner/name").fingerprint == before
    assert huggingface.pinned("hf:owner/name", "model") == f"hf:owner/name@{first}"
    huggingface._looked_up.cache_clear()  # as in another process
    assert huggingface.pinned("hf:owner/name:sub", "model") == f"hf:owner/name@{second}:sub"
    assert load_tokenizer("hf:owner/name").fingerprint != before
    assert load_tokenizer(f"hf:owner/name@{first}").fingerprint == before


def test_offline_the_cache_is_read_and_no_other(hub, folder, tmp_path, monkeypatch):
    sha = hub.push("owner/name", contents(folder))
    hub.push("owner/other", contents(folder))
    hub.push("owner/part", contents(folder))
    config_of("hf:owner/part")
    expected = load_tokenizer("hf:owner/name").fingerprint
    asked = len(hub.asked)
    hub_server.attach(monkeypatch, hub.address, tmp_path / "cache", offline=True)
    assert load_tokenizer("hf:owner/name").fingerprint == expected
    assert huggingface.pinned("hf:owner/name", "model") == f"hf:owner/name@{sha}"
    with pytest.raises(UserError, match=r"owner/other is not in the hub's cache, and HF_HUB_OFFLINE is set; run the"):
        load_tokenizer("hf:owner/other")
    with pytest.raises(
        UserError, match=r"owner/part@\w+: the cache lacks model.safetensors, and HF_HUB_OFFLINE is set"
    ):
        load_tokenizer("hf:owner/part")
    assert len(hub.asked) == asked


def test_a_hub_that_is_gone_is_told_unless_the_cache_holds_the_model(hub, folder, tmp_path, monkeypatch, capsys):
    hub.push("owner/name", contents(folder))
    expected = load_tokenizer("hf:owner/name").fingerprint
    hub_server.attach(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")  # the port that discards
    assert load_tokenizer("hf:owner/name").fingerprint == expected
    assert "cannot be reached" in capsys.readouterr().err
    with pytest.raises(
        UserError, match=r"^hf:owner/other: http://127.0.0.1:9 cannot be reached; check the network, or"
    ):
        load_tokenizer("hf:owner/other")


@pytest.mark.parametrize(
    "status, reason",
    [
        (401, "access is refused .401.; set HF_TOKEN to a token that may read it"),
        (403, "is gated; accept its terms at .*/owner/name, and set HF_TOKEN"),
        (404, "has no such model; check the id"),
        (429, "takes no more requests for now"),
        (500, "answers 500 when asking for its files; run the same command again later"),
    ],
)
def test_a_hub_that_refuses_is_told_in_one_line(hub, folder, status, reason, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.push("owner/name", contents(folder))
    hub.faults["/api/models/owner/name" if status != 404 else "/none"] = status
    with pytest.raises(UserError, match=f"^hf:owner/(name|none): .*{reason}") as told:
        load_model("hf:owner/name" if status != 404 else "hf:owner/none")
    assert "\n" not in str(told.value)


def test_what_is_no_model_is_told_before_its_weights_come(hub, folder):
    hub.push("owner/pictures", {"README.md": b"x", "train.parquet": b"y"})
    with pytest.raises(
        UserError, match=r"holds no model in a layout that is known: it has no config.json; known are: c"
    ):
        load_model("hf:owner/pictures")
    hub.push("owner/config", {"config.json": b"{}"})
    with pytest.raises(UserError, match="it has no weights; known are"):
        load_model("hf:owner/config")
    hub.push("owner/bert", {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"x"})
    with pytest.raises(UserError, match=r"is the config of another model .*bert"):
        load_model("hf:owner/bert")
    hub.push("owner/name", contents(folder))
    with pytest.raises(UserError, match=r"^hf:owner/name@v2: it has no revision v2; give one of its branches"):
        load_model("hf:owner/name@v2")
    assert "model.safetensors" not in hub.fetched()


def test_a_download_that_breaks_goes_on_where_it_stopped(hub, folder, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.push("owner/name", contents(folder))
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    hub.cut["model.safetensors"] = [5000]
    assert load_tokenizer("hf:owner/name").fingerprint == load_tokenizer(folder).fingerprint
    assert ("GET", "bytes=5000-") in [(kind, asked) for kind, _, asked in hub.asked]


def test_a_download_that_fails_keeps_what_has_arrived(hub, folder, monkeypatch, tmp_path):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.push("owner/name", in_shards(folder))
    last = "model-00002-of-00002.safetensors"
    hub.cut[last] = [3000, *[0] * 6]
    with pytest.raises(
        UserError, match=r"owner/name@.*: the download has stopped .*; run the same command again, it k"
    ):
        load_model("hf:owner/name")
    hub.asked.clear(), hub.cut.clear()
    load_model("hf:owner/name")
    assert hub.fetched() == {last}
    assert not list((tmp_path / "cache").rglob("*.incomplete"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_of_another_hash_is_told_and_not_kept(hub, folder, name, tmp_path):
    hub.push("owner/name", contents(folder))
    hub.wrong.add(name)
    with pytest.raises(UserError, match=f"{name} has arrived with another hash than the hub lists; run the same comm"):
        load_model("hf:owner/name")
    assert not list((tmp_path / "cache").rglob(name))
    hub.wrong.clear()
    load_model("hf:owner/name")


def test_a_command_records_the_commit(hub, folder, tmp_path, monkeypatch, capsys):
    sha = hub.push("owner/name", contents(folder))
    config, values = {"options": {"tokenizer": "hf:owner/name"}, "source": "photos"}, {"merge": ["a", "hf:owner/name"]}
    paths = [("config.options.tokenizer", "hf:owner/name"), ("config.source", "photos"), ("--merge", "hf:owner/name")]
    assert pin(paths, values, config)
    assert config == {"options": {"tokenizer": f"hf:owner/name@{sha}"}, "source": "photos"}
    assert values == {"merge": ["a", f"hf:owner/name@{sha}"]}
    done = running.run(capsys, monkeypatch, "convert", "--source=hf:owner/name", f"--target={tmp_path / 'target'}")
    assert not done.code and not done.err, done
    np.testing.assert_equal(
        load_file(tmp_path / "target" / "model.safetensors"), load_file(folder / "model.safetensors")
    )


@pytest.mark.slow
def test_the_client_takes_its_settings_from_its_variables_and_nothing_imports_it_unasked(hub, folder, tmp_path):
    hub.push("owner/name", contents(folder))
    program = (
        "import sys, arrag_jax.cli, arrag_jax.build_datastore, arrag_jax.train, arrag_jax.eval\n"
        "from arrag_jax.models.checkpoint import load_tokenizer\n"
        "load_tokenizer(sys.argv[1])\n"
        "print(sorted({'fsspec', 'gcsfs', 'huggingface_hub', 'pyarrow', 'ray', 's3fs'} & set(sys.modules)))\n"
        "print(load_tokenizer('hf:owner/name').fingerprint)\n"
    )
    environment = children.alone() | hub_server.variables(hub.address, tmp_path / "elsewhere")
    done = subprocess.run([sys.executable, "-c", program, folder], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["[]", load_tokenizer(folder).fingerprint], done
