"""Index files that ScaNN cannot read, with hashes that fit them: one line, and the command that it names mends it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from arrag_jax.config import ScannOptions
from arrag_jax.errors import UserError
from arrag_jax.files import sha256_of
from arrag_jax.retrieval import index
from arrag_jax.store.datastore import Datastore
from arrag_jax.store.shards import content_hash
from helpers import stored

OPTIONS = {
    "flat": ScannOptions(),
    "float32": ScannOptions(exhaustive_below=0, leaves=4, bytes_a_number=4),
    "int8": ScannOptions(exhaustive_below=0, leaves=4, bytes_a_number=1),
}
CONTEXT = np.random.default_rng(0).integers(0, stored.CODES, (9, 4)).astype(np.int32)


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, Path]:
    """A store with an index of each kind."""
    folders = {}
    for kind, options in OPTIONS.items():
        store = stored.build(tmp_path_factory.mktemp("stores") / kind)
        index.build_index(store, "codebook", options)
        folders[kind] = store.directory
    return folders


def sign(directory: Path) -> None:
    """Writes the record of an index anew, with the hashes of the files as they are."""
    record = json.loads((directory / "index.json").read_text())
    for name, facts in record["files"].items():
        facts |= {"bytes": (directory / name).stat().st_size, "sha256": sha256_of(directory / name)}
    record = {key: value for key, value in record.items() if key != "sha256"}
    (directory / "index.json").write_text(json.dumps({**record, "sha256": content_hash(record)}))


def spoilt(data: bytes, seed: int) -> list[bytes]:
    """What may have become of a file."""
    rng = np.random.default_rng(seed)
    flips = [(int(i), int(rng.integers(1, 256))) for i in rng.integers(0, len(data), 4)]
    head = [(int(i), 255) for i in rng.integers(0, min(len(data), 128), 4)]
    changed = [data[:i] + bytes([data[i] ^ bits]) + data[i + 1 :] for i, bits in flips + head]
    wider = data.replace(b"(108,", b"(999999999,").replace(b"'shape':(", b"'shape':(9")
    outside = data.replace(b'asset_path: "', b'asset_path: "../')
    return [b"", data[:-1], data[: len(data) // 2], bytes(len(data)), b"\xff" * len(data), wider, outside, *changed]


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPTIONS)
def test_what_scann_cannot_read_is_one_line_that_names_the_index(stores, kind, tmp_path):
    folder, options = Path(shutil.copytree(stores[kind], tmp_path / "store")), OPTIONS[kind]
    store, directory, refused = Datastore.open(folder), folder / "index-codebook", 0
    for seed, path in enumerate(sorted(directory.glob("shard-*/*"))):
        before = path.read_bytes()
        for data in spoilt(before, seed):
            path.write_bytes(data)
            sign(directory)
            try:
                index.load_index(store, "codebook", 5, options).search(CONTEXT, np.int32(0))
            except UserError as error:
                message, refused = str(error), refused + 1
                assert "\n" not in message and "index-codebook" in message, message
                assert f"--workdir={folder}" in message, message
        path.write_bytes(before)
    assert refused > 20


def test_the_mend_mends(stores, tmp_path):
    """It is the building command, which must see that the index cannot be read although its hashes fit."""
    folder, options = Path(shutil.copytree(stores["int8"], tmp_path / "store")), OPTIONS["int8"]
    store, directory = Datastore.open(folder), folder / "index-codebook"
    (directory / "shard-00000" / "scann_config.pb").write_bytes(b"?")
    sign(directory)
    with pytest.raises(UserError, match=r"cannot be read by ScaNN .*; run: python -m arrag_jax.build_datastore"):
        index.load_index(store, "codebook", 5, options)
    index.refresh_index(store, "codebook", options)
    index.load_index(store, "codebook", 5, options).search(CONTEXT, np.int32(0))


def test_an_index_of_as_many_shards_but_other_entries_is_refused(stores, tmp_path):
    folder = Path(shutil.copytree(stores["flat"], tmp_path / "store"))
    path = folder / "index-codebook" / "index.json"
    record = json.loads(path.read_text())
    record["entries"] = [record["entries"][0] - 1]
    path.write_text(json.dumps(record))
    sign(path.parent)
    with pytest.raises(UserError, match=r"cannot be read by ScaNN \('it has shape"):
        index.load_index(Datastore.open(folder), "codebook", 5, OPTIONS["flat"])
