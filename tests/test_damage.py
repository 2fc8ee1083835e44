"""Damaged stores and indexes: one table of what is wrong, who finds it, and the message. No traceback anywhere."""

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from arrag_jax import build_datastore
from arrag_jax.errors import UserError
from arrag_jax.retrieval import index
from arrag_jax.retrieval.patches import MOST_ROWS, stored_patches
from arrag_jax.retrieval.scann import shard_bounds
from arrag_jax.retrieval.scann_rules import EXHAUSTIVE
from arrag_jax.store.datastore import Datastore
from helpers import stored

CODES, LATENTS, SOURCES = (
    "codes-00001-of-00003.arrayrecord",
    "latents-00002-of-00003.arrayrecord",
    "sources-00000-of-00003.txt",
)
RECORD, INDEXED = "index-latent/index.json", "index-latent/shard-00000/dataset.npy"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    store = stored.build(tmp_path_factory.mktemp("stores") / "whole")
    index.build_index(store, "latent", EXHAUSTIVE)
    return store.directory


def flip(place: int) -> Callable[[bytes], bytes]:
    """One byte is another one; the size stays."""
    return lambda data: data[:place] + bytes([data[place] ^ 255]) + data[place:][1:]


def swap(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def swapped(data: bytes) -> bytes:
        assert old in data
        return data.replace(old, new, 1)

    return swapped


def rubbish(data: bytes) -> bytes:
    return b"?" * len(data)


def verify(folder: Path) -> None:
    build_datastore.run(None, str(folder), verify=True)


def use(folder: Path) -> None:
    """All that a search or a page of provenance reads."""
    store = Datastore.open(folder)
    for kind in ("codebook", "latent"):
        stored_patches(store, kind, (0, store.num_patches))
    _ = store.sources
    index.load_index(store, "latent", 5, EXHAUSTIVE)


BUILD, VERIFY = r"; build it with: python -m arrag_jax\.build_datastore --config=… --workdir=…", "--workdir=.* --verify"
AGAIN, ANEW = (
    "; delete .*index-latent and build it again",
    r"; run: python -m arrag_jax\.build_datastore --config\.indexes=latent",
)
# What is done to which file (None: it is removed), who finds it, and what is said.
DAMAGE = {
    "no manifest": ("manifest.json", None, use, r"manifest.json is missing\); build it with: python -m"),
    "cut manifest": ("manifest.json", lambda x: x[:99], use, r"manifest.json is not JSON \("),
    "empty manifest": ("manifest.json", lambda _: b"{}", use, "of a datastore: it has format_version None" + BUILD),
    "format": ("manifest.json", swap(b'_version": 1', b'_version": 9'), use, "has format 9, this code reads 1" + BUILD),
    "setting": ("manifest.json", swap(b'"split"', b'"spilt"'), use, r"unknown key .*spilt \(did you mean 'split'\?\)"),
    "changed manifest": ("manifest.json", swap(b'"all"', b'"any"'), verify, "manifest.json is damaged: it is not what"),
    "short codes": (CODES, lambda x: x[:-1], use, rf"{CODES} has \d+ bytes, not \d+" + BUILD),
    "no codes": (CODES, None, use, rf"{CODES} has no bytes, not \d+" + BUILD),
    "codes": (CODES, rubbish, use, rf"{CODES} is damaged \(.*{VERIFY}"),
    "latents": (LATENTS, rubbish, use, rf"{LATENTS} is damaged \(.*{VERIFY}"),
    "codes, verified": (CODES, flip(-1), verify, rf"{CODES} is damaged: its SHA-256 is not the manifest's" + BUILD),
    "codebook": ("codebook.npz", flip(200), use, rf"codebook.npz is damaged \(.*{VERIFY}"),
    "no zip": ("codebook.npz", rubbish, use, rf"codebook.npz is damaged \(.*{VERIFY}"),
    "lost newline": (SOURCES, swap(b"\n", b" "), use, rf"{SOURCES} is damaged \(it holds 3 images, not 4\).*{VERIFY}"),
    "no text": (SOURCES, flip(3), use, rf"{SOURCES} is damaged \(.*codec can't decode.*{VERIFY}"),
    "no record": (RECORD, None, verify, "index.json is missing" + AGAIN),
    "no record, used": (RECORD, None, use, "index.json is missing" + ANEW),
    "cut record": (RECORD, lambda x: x[:9], verify, r"json is damaged: it is not an index's record \(.*" + AGAIN),
    "record, used": (RECORD, lambda _: b"[1]", use, r"index.json is damaged: it is not an index's record \(.*" + ANEW),
    "changed record": (RECORD, swap(b'"kind"', b'"Kind"'), verify, "it is not what was written" + AGAIN),
    "old index": (RECORD, swap(b'_version": 3', b'_version": 2'), verify, "has version 2, this code reads 3" + AGAIN),
    "index": (INDEXED, flip(-1), use, rf"index file .*{INDEXED} is damaged" + ANEW),
    "index, verified": (INDEXED, flip(-1), verify, rf"index file .*{INDEXED} is damaged" + AGAIN),
    "no index file": (INDEXED, None, verify, r"missing or foreign files: \['shard-00000/dataset.npy'\]" + AGAIN),
    "foreign file": ("index-latent/x.pkl", lambda _: b"", verify, r"has missing or foreign files: \['x.pkl'\]" + AGAIN),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_line_that_names_the_file_and_the_mend(whole, tmp_path, case):
    name, spoil, find, message = DAMAGE[case]
    folder = Path(shutil.copytree(whole, tmp_path / "store"))
    if spoil is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(spoil((folder / name).read_bytes() if (folder / name).exists() else b""))
    with pytest.raises(UserError, match=message) as caught:
        find(folder)
    assert "\n" not in str(caught.value)


def test_what_is_undamaged_is_used_and_verified(whole):
    use(whole)
    verify(whole)


@pytest.mark.parametrize("rows, opened", [((0, 36), {0}), ((40, 47), {1}), ((35, 37), {0, 1}), ((70, 108), {1, 2})])
def test_a_part_of_a_store_opens_only_its_files(whole, tmp_path, rows, opened):
    """Four images of nine patches a file; all others are rubbish of the same size."""
    folder = Path(shutil.copytree(whole, tmp_path / "store"))
    for path in (*folder.glob("codes-*"), *folder.glob("latents-*")):
        if int(path.name.split("-")[1]) not in opened:
            path.write_bytes(rubbish(path.read_bytes()))
    first, end = rows
    for kind in ("codebook", "latent"):
        part = stored_patches(Datastore.open(folder), kind, rows)
        place = np.arange(end - first) if kind == "latent" else part.rows
        entry = place if kind == "latent" else np.repeat(np.arange(len(part.keys)), np.diff(part.starts))
        undamaged = Datastore.open(whole)
        np.testing.assert_array_equal(part.keys[entry], stored.keys_of(undamaged, kind)[first:end][place])
        np.testing.assert_array_equal(part.codes, stored.values_of(undamaged)[first:end][place])
    with pytest.raises(UserError, match="is damaged"):
        _ = Datastore.open(folder).codes


def test_numbers_that_do_not_fit_are_told(whole):
    store = Datastore.open(whole)
    large = dataclasses.replace(store, num_images=MOST_ROWS // store.settings.patches_per_image + 1)
    mend = f"num_images={MOST_ROWS // store.settings.patches_per_image}"
    with pytest.raises(
        UserError, match=re.escape(f"{large.num_patches:,} patches, 2,147,483,647 can be numbered") + f".*{mend}"
    ):
        stored_patches(large, "codebook", (0, 9))
    with pytest.raises(UserError, match="108 stored patches cannot be spread over 109 shards; choose 108 or fewer"):
        index.build_index(store, "codebook", EXHAUSTIVE, 109)
    assert shard_bounds(3, 3) == [(0, 1), (1, 2), (2, 3)]


def test_the_mend_for_another_number_of_shards_mends(whole, tmp_path):
    """By the words of the message itself."""
    folder = Path(shutil.copytree(whole, tmp_path / "store"))
    with pytest.raises(UserError, match=r"has 1 shards, not 2; .*--config.index_shards=2 --workdir=.*store"):
        index.load_index(Datastore.open(folder), "latent", 5, EXHAUSTIVE, shards=2)
    index.refresh_index(Datastore.open(folder), "latent", EXHAUSTIVE, shards=2)
    context = np.random.default_rng(0).integers(0, stored.CODES, (9, 4)).astype(np.int32)
    host = index.load_index(Datastore.open(folder), "latent", 5, EXHAUSTIVE, shards=2)
    found = [host.search(context, np.int32(shard)) for shard in range(2)]
    both = np.concatenate([distance for _, distance, _ in found], 1)
    _, one, _ = index.load_index(Datastore.open(whole), "latent", 5, EXHAUSTIVE).search(context, np.int32(0))
    np.testing.assert_allclose(np.sort(both, 1)[:, :5], one, atol=1e-5)
